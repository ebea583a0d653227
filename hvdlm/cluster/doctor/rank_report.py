"""What each rank reports to the others: its host, devices, software, and its interface to the next node."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from hvdlm.cluster.doctor.interface_variables import named_interfaces
from hvdlm.cluster.doctor.software import installed_software
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.gpus import visible_gpus
from hvdlm.comm.interfaces import Interface, interface_towards, own_interfaces

# Names of the processes that start ranks: of Open MPI 5 and 4, MPICH and its derivatives; then Slurm, Horovod, PyTorch.
MPI_LAUNCHERS = frozenset(
    ("prterun", "prted", "mpirun", "mpiexec", "orterun", "orted", "mpiexec.hydra", "hydra_pmi_proxy", "pmi_proxy")
)
_LAUNCHERS = MPI_LAUNCHERS | {"slurmstepd", "horovodrun", "torchrun"}

# The environment variable that selects an engine's interface for CPU tensors.
_INTERFACE_VARIABLE = {
    "torch": "GLOO_SOCKET_IFNAME",
    "horovod": "HOROVOD_GLOO_IFACE",
    "mpi": "OMPI_MCA_btl_tcp_if_include",
}


@dataclass(frozen=True)
class RankReport:
    """What one rank reports. Cores have the kernel's numbers."""

    rank: int
    host: str
    local_rank: int
    launcher: str  # as in comm.launch.Launch
    engine: str
    gpus: tuple[str, ...]  # names of the visible GPUs
    gpu_uuids: tuple[str, ...]  # of the same
    supports_gpus: bool  # the engine communicates GPU tensors directly, not by a copy in host memory
    cores: frozenset[int]  # CPU affinity of this process
    launcher_cores: frozenset[int]  # CPU affinity of the launcher's process on this host; all cores without a launcher
    software: Mapping[str, str]
    interfaces: tuple[Interface, ...]
    towards_next_node: Interface | None  # None if there is one node, or no route to the next one's name
    variables: Mapping[str, str]  # environment variables that select interfaces, as the user has set them
    shared_memory: int  # bytes free in /dev/shm before the engine started
    parent: str  # name of the parent process if it is a launcher's, else ""
    siblings: int  # children of the parent process, including this one

    @property
    def device(self) -> str:
        """The name of its GPU, or "CPU"."""
        return self.gpus[self.local_rank % len(self.gpus)] if self.gpus else "CPU"


def gather_reports(
    communicator: Communicator, launcher: str, variables: Mapping[str, str], shared_memory: int
) -> list[RankReport]:
    """The reports of all ranks, on every rank. Collective.

    `variables` and `shared_memory`: as they were before the engine started, which changes both.
    """
    parent, launcher_process = _parent_and_launcher()
    own = RankReport(
        rank=communicator.rank,
        host=communicator.hosts[communicator.rank],
        local_rank=communicator.local_rank,
        launcher=launcher,
        engine=communicator.engine,
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(len(visible_gpus()))),
        gpu_uuids=tuple(visible_gpus()),
        supports_gpus=communicator.supports("cuda"),
        cores=frozenset(os.sched_getaffinity(0)),
        launcher_cores=frozenset(launcher_process.cpu_affinity() if launcher_process else range(os.cpu_count() or 1)),
        software=installed_software(),
        interfaces=tuple(own_interfaces()),
        towards_next_node=_towards_next_node(communicator),
        variables=dict(variables),
        shared_memory=shared_memory,
        parent=parent.name() if parent and parent == launcher_process else "",
        siblings=len(parent.children()) if parent else 1,
    )
    return communicator.all_gather_object(own)


def one_rank_per_host(reports: list[RankReport]) -> list[RankReport]:
    """The report of the first rank on each host, in the order of ranks."""
    firsts: dict[str, RankReport] = {}
    for each in reports:
        firsts.setdefault(each.host, each)
    return list(firsts.values())


def _parent_and_launcher() -> tuple[psutil.Process | None, psutil.Process | None]:
    """The parent of this process, and its nearest ancestor that belongs to a launcher."""
    ancestors = psutil.Process().parents()
    return next(iter(ancestors), None), next((each for each in ancestors if each.name() in _LAUNCHERS), None)


def _towards_next_node(communicator: Communicator) -> Interface | None:
    """The interface that the engine's environment variable selects, or else the one of the kernel's route."""
    others = [host for host in communicator.hosts if host != communicator.hosts[communicator.rank]]
    if not others:
        return None
    value = os.environ.get(_INTERFACE_VARIABLE.get(communicator.engine, ""), "")
    named = named_interfaces(value, own_interfaces())
    if named:
        return named[0]
    nodes = list(dict.fromkeys(communicator.hosts))
    return interface_towards(nodes[(communicator.node_rank + 1) % len(nodes)])
