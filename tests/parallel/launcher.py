"""Starts real ranks for tests: mpirun or horovodrun, a deadline, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

# The launchers of the environment that runs the tests, whatever the PATH of the caller.
BIN = Path(sys.executable).parent

# An environment variable that all descendants of a job inherit, whatever sessions they make for themselves.
_MARK = "HVDLM_TEST_JOB"


@dataclass(frozen=True)
class Result:
    """How a job ended."""

    status: int
    output: str  # stdout and stderr together


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The test's environment with our launchers first on the PATH and one thread a rank."""
    variables = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }
    if os.geteuid() == 0:
        variables.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return variables


def launcher_command(launcher: str, ranks: int) -> list[str]:
    """The words before the program; launcher: "none", "mpirun", "torchrun", "horovodrun --gloo", "horovodrun --mpi"."""
    if launcher == "none":
        return []
    if launcher == "mpirun":
        return ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none"]
    if launcher == "torchrun":
        return ["torchrun", "--nproc-per-node", str(ranks), "--no-python"]
    name, *options = launcher.split()
    return [name, *options, "-np", str(ranks), "-H", f"localhost:{ranks}"]


def ranks_of(command: Sequence[str]) -> int:
    """How many ranks a command of `launcher_command` starts; 1 without a launcher."""
    words = list(map(str, command))
    after = [words[index + 1] for index, word in enumerate(words) if word in ("-np", "-n", "--nproc-per-node")]
    return sum(map(int, after)) or 1


def start(command: Sequence[str], extra: Mapping[str, str] | None = None, cwd: Path | None = None) -> Job:
    """Starts a command whose descendants can be told from all other processes.

    HVDLM_TEST_LAUNCHES in the environment names a file that gets a line for each: the number of its ranks, its words.
    """
    if log := os.environ.get("HVDLM_TEST_LAUNCHES"):
        with Path(log).open("a", encoding="utf-8") as file:
            words = shlex.join(map(str, command)).replace("\n", " ")
            print(ranks_of(command), words[:300], sep="\t", file=file)
    mark = uuid.uuid4().hex
    # Its own, for mpirun names files by its process number and starts no more where a killed one has left the same
    temporary = tempfile.TemporaryDirectory(prefix="hvdlm-", ignore_cleanup_errors=True)
    process = subprocess.Popen(
        list(command),
        env={**environment(extra), "TMPDIR": temporary.name, _MARK: mark},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return Job(process, mark, temporary)


class Job:
    """A command under way, and every process that it has started, however deep; none outlives a `with` block."""

    def __init__(self, process: subprocess.Popen[str], mark: str, temporary: tempfile.TemporaryDirectory[str]) -> None:
        self.process = process
        self._mark = mark
        self._temporary = temporary

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._temporary.cleanup()

    def finish(self, deadline: float) -> Result:
        """Waits for the end; past `deadline` (seconds), or if processes are left behind, kills them and fails."""
        name = " ".join(map(str, self.process.args))  # type: ignore[arg-type]
        try:
            output, _ = self.process.communicate(timeout=deadline)
        except subprocess.TimeoutExpired:
            self.kill()
            output, _ = self.process.communicate()
            raise AssertionError(f"{name} did not end within {deadline:g} s:\n{output}") from None
        left = self._left_behind()
        assert not left, f"{name} left processes behind: {left}\n{output}"
        return Result(self.process.returncode, output)

    def members(self) -> list[psutil.Process]:
        """The processes of this job that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """The Python processes that mpirun or horovodrun have started, by rank."""
        variables = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")
        numbered = []
        for process in self.members():
            own = process.environ()
            rank = next((int(own[name]) for name in variables if name in own), None)
            if rank is not None and not process.children():
                numbered.append((rank, process))
        return [process for _, process in sorted(numbered, key=lambda pair: pair[0])]

    def kill(self) -> None:
        """Ends every process of the job."""
        for member in self.members():
            with contextlib.suppress(psutil.Error):
                member.kill()

    def _left_behind(self) -> list[list[str]]:
        # Launchers' helpers may outlive them by moments.
        _, alive = psutil.wait_procs(self.members(), timeout=10)
        names = [process.cmdline() for process in alive]
        self.kill()
        return names


def run(
    command: Sequence[str],
    deadline: float = 200,
    extra: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Result:
    """Runs a command to its end, within `deadline` seconds and leaving no process behind."""
    with start(command, extra, cwd) as job:
        return job.finish(deadline)


def run_ranks(launcher: str, ranks: int, arguments: Sequence[str], deadline: float = 200, **options: object) -> Result:
    """Runs `python arguments...` on ranks of a launcher."""
    return run([*launcher_command(launcher, ranks), sys.executable, *arguments], deadline, **options)  # type: ignore[arg-type]
