"""The processes of the launcher that started this rank: found by their names, and watched, for they may be killed.

Not every launcher ends its ranks when it is killed itself (horovodrun does not). A rank whose launcher is gone asks
itself to end, by SIGTERM: in training that is the request to save and stop.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from hvdlm.comm.failure import say
from hvdlm.comm.launcher_end import end_later
from hvdlm.errors import HvdlmError

if TYPE_CHECKING:
    from hvdlm.comm.launch import Launch

# Names of the processes that start ranks: of Open MPI 5 and 4, MPICH and its derivatives; then Slurm, Horovod, PyTorch.
MPI_LAUNCHERS = frozenset(
    ("prterun", "prted", "mpirun", "mpiexec", "orterun", "orted", "mpiexec.hydra", "hydra_pmi_proxy", "pmi_proxy")
)
_LAUNCHERS = MPI_LAUNCHERS | {"slurmstepd", "horovodrun", "torchrun"}

# Of those, what runs on hosts other than the one where the job was started
_DAEMONS = frozenset(("prted", "orted", "hydra_pmi_proxy", "pmi_proxy", "slurmstepd"))

# Of those that are started as `python -m`, the modules.
_MODULES = {"torch.distributed.run", "torch.distributed.launch", "horovod.runner.launch"}

# horovodrun starts ranks of other hosts by ssh, whose session ends with it.
_SSH_SESSIONS = {"sshd", "sshd-session"}

_SECONDS_BETWEEN_CHECKS = 1.0


def launcher_processes() -> list[psutil.Process]:
    """The ancestors of this process that belong to a launcher, the nearest first."""
    return [each for each in psutil.Process().parents() if _is_launcher(each)]


def first_launcher_process() -> psutil.Process | None:
    """The process of the launcher that a user has started, if it runs on this host."""
    found = [each for each in psutil.Process().parents() if _is_launcher(each) or _runs_mpirun(each)]
    return found[-1] if found and _name(found[-1]) not in _DAEMONS else None


def end_launcher_after(seconds: float) -> None:
    """For a rank that gives up: if its MPI launcher has not ended after so many seconds, it is killed."""
    end_later([each for each in launcher_processes() if _name(each) in MPI_LAUNCHERS], seconds)


def refuse_ranks_that_seem_alone(launch: Launch) -> None:
    """Raises HvdlmError in one of several processes that an MPI launcher has started, if nothing tells them so.

    The other MPI may set variables that hvdlm does not know: each of its ranks would train alone, all of them in one
    run directory.
    """
    parent = psutil.Process().parent()
    if launch.launcher != "none" or parent is None or _name(parent) not in MPI_LAUNCHERS:
        return
    siblings = len(parent.children()) - 1
    if siblings:
        raise HvdlmError(
            f"{_name(parent)} started this process on {socket.gethostname()} and {siblings} more, and none of its "
            "variables says which rank this is: start them with the mpirun of the MPI for which mpi4py is installed, "
            "with horovodrun, or with srun --mpi=pmix"
        )


def watch_launcher(launch: Launch) -> None:
    """From now on, a thread asks this process to end when a process of its launcher is gone."""
    watched = launcher_processes()
    if launch.launcher == "horovodrun":
        ancestors = psutil.Process().parents()
        watched += [each for each in ancestors if _runs_mpirun(each)]
        watched = watched or [each for each in ancestors if _name(each) in _SSH_SESSIONS][:1]
    if launch.launcher != "none" and watched:
        watch(watched, lambda gone: _end_by_request(launch, gone))


def watch(processes: Sequence[psutil.Process], end: Callable[[psutil.Process], None]) -> threading.Thread:
    """A thread that calls `end` with the first of `processes` that is gone."""

    def run() -> None:
        while True:
            for each in processes:
                if not _is_running(each):
                    end(each)
                    return
            time.sleep(_SECONDS_BETWEEN_CHECKS)

    thread = threading.Thread(target=run, name="hvdlm-launcher-watch", daemon=True)
    thread.start()
    return thread


def _end_by_request(launch: Launch, gone: psutil.Process) -> None:
    say(
        f"hvdlm: error: rank {launch.rank} on {socket.gethostname()}: {launch.launcher} (process {gone.pid}), which "
        "started this job, is gone: the job ends, and saves first if it is training; go on with --resume latest"
    )
    os.kill(os.getpid(), signal.SIGTERM)


def _is_running(process: psutil.Process) -> bool:
    """Whether it is there and has not ended: one that has, and for which its parent has not asked yet, is a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _runs_mpirun(process: psutil.Process) -> bool:
    """Whether it is the shell that `horovodrun --mpi` becomes, which starts mpirun."""
    words = _words(process)
    return words[1:2] == ["-c"] and words[2:3] != [] and words[2].lstrip().startswith("mpirun ")


def _is_launcher(process: psutil.Process) -> bool:
    words = _words(process)
    named = {_name(process), *(Path(word).name for word in words[:2])}
    return bool(named & _LAUNCHERS) or any(
        word == "-m" and following in _MODULES for word, following in pairwise(words)
    )


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""
