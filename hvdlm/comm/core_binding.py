"""What takes cores and threads from ranks without their users' knowing: OpenMP's variables, and launchers that bind."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import hvdlm
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.launcher_process import MPI_LAUNCHERS, launcher_processes

logger = logging.getLogger(__name__)

# With these, GNU's and Intel's OpenMP bind the thread that loads them, PyTorch's first, to one place: the same one in
# every process that may use the same cores (pytorch/pytorch issue 91989).
_BINDING_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")

_SLURM_LAUNCHER = "slurmstepd"
_UNBIND = {_SLURM_LAUNCHER: "start srun with --cpu-bind=none, or give each task cores with --cpus-per-task"}

_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Binding:
    """What one rank knows of its cores. CPUs have the kernel's numbers; those of one core run on the same hardware."""

    host: str
    cpus: frozenset[int]  # that this rank may use
    cores: frozenset[int]  # theirs, each by the first of its CPUs
    launcher: str  # name of the process that started this rank, "" if it is none of those that bind
    launcher_cores: int  # that the launcher may use on this host; 0 if there is none
    bound_by: str  # variables of OpenMP that bound this rank to a part of `cpus`, which has been undone
    remark: str  # about OMP_NUM_THREADS, or ""


def drop_unchosen_threads(environment: MutableMapping[str, str]) -> str:
    """Takes OMP_NUM_THREADS out of `environment` where it says nothing of what the user wants.

    Returns a sentence that says so, or "" where the variable stays or is not there.
    """
    value = environment.get("OMP_NUM_THREADS", "")
    if not value.strip():
        return ""
    outermost = value.split(",")[0].strip()  # the others are of nested teams
    if not (outermost.isascii() and outermost.isdigit() and int(outermost)):
        del environment["OMP_NUM_THREADS"]
        return f"OMP_NUM_THREADS = {value!r} is no number of threads: ranks share their cores as if it were not set"
    is_from_torchrun = "TORCHELASTIC_RUN_ID" in environment and environment.get("LOCAL_WORLD_SIZE", "1") != "1"
    if is_from_torchrun and value == "1":  # as it sets where it starts several ranks and nobody has set it
        del environment["OMP_NUM_THREADS"]
        return (
            "torchrun has set OMP_NUM_THREADS=1, as nobody else had: ranks share their cores instead; to keep it, set "
            "train.threads = 1"
        )
    return ""


def release_cores(environment: Mapping[str, str]) -> str:
    """Lets all threads of this process run where it was started, if OpenMP has bound it to a part of that.

    Returns the variables that made OpenMP do so, or "". Threads that OpenMP starts later are bound again.
    """
    names = [f"{name}={environment[name]}" for name in _BINDING_VARIABLES if environment.get(name)]
    if not names or not os.sched_getaffinity(0) < hvdlm.AFFINITY_AT_START:
        return ""
    for thread in psutil.Process().threads():
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(thread.id, hvdlm.AFFINITY_AT_START)
    return " and ".join(names)


def own_binding(communicator: Communicator, bound_by: str, remark: str = "") -> Binding:
    """That of this rank. `bound_by`, `remark`: what the two functions above have returned."""
    cpus = frozenset(os.sched_getaffinity(0))
    launcher, launcher_cores = _launcher()
    return Binding(
        communicator.hosts[communicator.rank], cpus, _cores(cpus), launcher, launcher_cores, bound_by, remark
    )


def same_cores(ranks: Sequence[Binding]) -> list[tuple[str, str]]:
    """What is wrong, and what to do, where OpenMP binds ranks that share cores to the same one of them."""
    for rank in ranks:
        sharing = [other for other in ranks if other.host == rank.host and other.cpus & rank.cpus]
        if rank.bound_by and len(sharing) > 1:
            names = " and ".join(setting.partition("=")[0] for setting in rank.bound_by.split(" and "))
            return [(f"{rank.bound_by} binds threads of all ranks on {rank.host} to the same cores", f"unset {names}")]
    return []


def idle_cores(ranks: Sequence[Binding]) -> list[tuple[str, str]]:
    """What is wrong, and what to do, where the ranks of a host together may use fewer cores than their launcher."""
    found = []
    for host in dict.fromkeys(rank.host for rank in ranks):
        own = [rank for rank in ranks if rank.host == host]
        used, there = len(frozenset[int]().union(*(rank.cores for rank in own))), own[0].launcher_cores
        if used < there:
            what = f"{_counted(len(own), 'rank')} on {host} may use {used} of its {_counted(there, 'core')}"
            found.append((what, _UNBIND.get(own[0].launcher, "start mpirun with --bind-to none")))
    if len(found) < 2:
        return found
    (what, remedy), *others = found
    return [(f"{what}, and so it is on {_counted(len(others), 'more host')}", remedy)]


def warn_of_bindings(communicator: Communicator, bound_by: str, remark: str) -> None:
    """Rank 0 says what binds the ranks of this job. Collective."""
    ranks = communicator.all_gather_object(own_binding(communicator, bound_by, remark))
    if communicator.rank == 0:
        remarks = dict.fromkeys(rank.remark for rank in ranks if rank.remark)
        for sentence in (*remarks, *(f"{what}: {remedy}" for what, remedy in same_cores(ranks) + idle_cores(ranks))):
            logger.warning("%s", sentence)


def _launcher() -> tuple[str, int]:
    """The name of the nearest ancestor that may have bound this process, and how many cores it may use; or "" and 0."""
    try:
        for process in launcher_processes():
            if process.name() in MPI_LAUNCHERS | {_SLURM_LAUNCHER}:  # the others do not bind
                cores = len(_cores(frozenset(process.cpu_affinity() or ())))
                if process.name() == _SLURM_LAUNCHER:  # it may use the whole node, of which this job has a part
                    cores = min(cores, int(os.environ.get("SLURM_CPUS_ON_NODE", "0")) // len(_siblings(0)))
                return process.name(), cores
    except (psutil.Error, OSError, ValueError):  # it has ended, or hides from this user; no number
        pass
    return "", 0


def _cores(cpus: frozenset[int]) -> frozenset[int]:
    return frozenset(min(_siblings(cpu)) for cpu in cpus)


def _siblings(cpu: int) -> list[int]:
    """The CPUs of the core that `cpu` is of, itself included."""
    try:
        text = (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="ascii")
        found: list[int] = []
        for part in text.strip().split(","):  # 0,64 or 0-1
            first, _, last = part.partition("-")
            found.extend(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return [cpu]
    return found or [cpu]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
