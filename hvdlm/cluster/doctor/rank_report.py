"""What a rank can say of itself: where it runs, on what, and how it reaches the next node."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from hvdlm.cluster.doctor.interface_variables import named_interfaces
from hvdlm.cluster.doctor.software import installed_software
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.interfaces import Interface, interface_towards, own_interfaces

# Processes that start ranks, by name: of Open MPI 5 and 4, MPICH and its kin; then of Slurm, Horovod, PyTorch.
MPI_STARTERS = frozenset(
    ("prterun", "prted", "mpirun", "mpiexec", "orterun", "orted", "mpiexec.hydra", "hydra_pmi_proxy", "pmi_proxy")
)
_STARTERS = MPI_STARTERS | {"slurmstepd", "horovodrun", "torchrun"}

# The variable by which an engine is told its interface for CPU tensors.
_VARIABLE = {"torch": "GLOO_SOCKET_IFNAME", "horovod": "HOROVOD_GLOO_IFACE", "mpi": "OMPI_MCA_btl_tcp_if_include"}


@dataclass(frozen=True)
class Facts:
    """One rank, as it sees itself. Cores are numbered as the kernel numbers them."""

    rank: int
    host: str
    local_rank: int
    launcher: str  # as of comm.launch.Launch
    engine: str
    gpus: tuple[str, ...]  # the names of those it can see
    reaches_gpus: bool  # whether the engine takes tensors where they lie on a GPU
    cores: frozenset[int]  # that it may run on
    cores_of_job: frozenset[int]  # that the process which started it may run on
    software: Mapping[str, str]
    interfaces: tuple[Interface, ...]
    towards_next_node: Interface | None  # None where there is no other node, or no way to it by its name
    variables: Mapping[str, str]  # that name interfaces, as the user has set them
    shared_memory: int  # bytes that were free in /dev/shm before this job took some
    starter: str  # the name of the launcher's process that started this one, empty if none did
    siblings: int  # processes that it has started on this host, this one too

    @property
    def device(self) -> str:
        """What it computes on."""
        return self.gpus[self.local_rank % len(self.gpus)] if self.gpus else "CPU"


def gather_facts(
    communicator: Communicator, launcher: str, variables: Mapping[str, str], shared_memory: int
) -> list[Facts]:
    """The facts of every rank, on every rank; `variables` and `shared_memory` as before the job began. Collective."""
    parent, starter = _starter()
    own = Facts(
        rank=communicator.rank,
        host=communicator.hosts[communicator.rank],
        local_rank=communicator.local_rank,
        launcher=launcher,
        engine=communicator.engine,
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        reaches_gpus=communicator.supports("cuda"),
        cores=frozenset(os.sched_getaffinity(0)),
        cores_of_job=frozenset(starter.cpu_affinity()) if starter else frozenset(range(os.cpu_count() or 1)),
        software=installed_software(),
        interfaces=tuple(own_interfaces()),
        towards_next_node=_towards_next_node(communicator),
        variables=dict(variables),
        shared_memory=shared_memory,
        starter=starter.name() if starter and starter == parent else "",
        siblings=len(parent.children()) if parent else 1,
    )
    return communicator.all_gather_object(own)


def first_of_each_host(facts: list[Facts]) -> list[Facts]:
    """One rank a host, in the order of ranks."""
    firsts: dict[str, Facts] = {}
    for each in facts:
        firsts.setdefault(each.host, each)
    return list(firsts.values())


def _starter() -> tuple[psutil.Process | None, psutil.Process | None]:
    """The parent of this process, and the nearest of its ancestors that is a launcher's process."""
    ancestors = psutil.Process().parents()
    return next(iter(ancestors), None), next((each for each in ancestors if each.name() in _STARTERS), None)


def _towards_next_node(communicator: Communicator) -> Interface | None:
    """The interface that the engine has been told to use, or else the way that the kernel takes."""
    others = [host for host in communicator.hosts if host != communicator.hosts[communicator.rank]]
    if not others:
        return None
    told = os.environ.get(_VARIABLE.get(communicator.engine, ""), "")
    named = named_interfaces(told, own_interfaces())
    if named:
        return named[0]
    nodes = list(dict.fromkeys(communicator.hosts))
    return interface_towards(nodes[(communicator.node_rank + 1) % len(nodes)])
