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
from hvdlm.comm.core_binding import Binding, own_binding, release_cores
from hvdlm.comm.gpus import visible_gpus
from hvdlm.comm.interfaces import Interface, interface_towards, own_interfaces
from hvdlm.comm.launcher_process import launcher_processes
from hvdlm.cores import usable_cores

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
    binding: Binding
    usable_cores: int = 0  # fewer than `cores` where a control group has a CPU quota; 0: not known
    cpu_capability: str = ""  # the instruction set of PyTorch's loops, such as AVX512
    compiler_problem: str | None = None  # why codecs cannot be compiled here, or not be kept

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
    parent = psutil.Process().parent()
    launcher_process = next(iter(launcher_processes()), None)
    binding = own_binding(communicator, release_cores(os.environ))
    uuids = visible_gpus()
    own = RankReport(
        rank=communicator.rank,
        host=communicator.hosts[communicator.rank],
        local_rank=communicator.local_rank,
        launcher=launcher,
        engine=communicator.engine,
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(len(uuids))),
        gpu_uuids=tuple(uuids),
        supports_gpus=communicator.supports("cuda"),
        cores=binding.cpus,
        launcher_cores=frozenset(launcher_process.cpu_affinity() if launcher_process else range(os.cpu_count() or 1)),
        software=installed_software(),
        interfaces=tuple(own_interfaces()),
        towards_next_node=_towards_next_node(communicator),
        variables=dict(variables),
        shared_memory=shared_memory,
        parent=parent.name() if parent and parent == launcher_process else "",
        siblings=len(parent.children()) if parent else 1,
        binding=binding,
        usable_cores=usable_cores(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        compiler_problem=_compiler_problem(),
    )
    return communicator.all_gather_object(own)


def one_rank_per_host(reports: list[RankReport]) -> list[RankReport]:
    """The report of the first rank on each host, in the order of ranks."""
    firsts: dict[str, RankReport] = {}
    for each in reports:
        firsts.setdefault(each.host, each)
    return list(firsts.values())


def _compiler_problem() -> str | None:
    """What Numba, by which codecs are compiled, cannot do here."""
    try:
        from hvdlm.gradients.codecs.compiled import cache_problem
    except ImportError as error:  # it also refuses versions of NumPy that it does not know
        return f"Numba cannot be imported ({error})"
    return cache_problem()


def _towards_next_node(communicator: Communicator) -> Interface | None:
    """The interface that the engine's environment variable selects, or else the one of the kernel's route."""
    others = [host for host in communicator.hosts if host != communicator.hosts[communicator.rank]]
    if not others:
        return None
    variable = _INTERFACE_VARIABLE.get(communicator.engine, "")
    named = named_interfaces(variable, os.environ.get(variable, ""), own_interfaces())
    if named:
        return named[0]
    nodes = list(dict.fromkeys(communicator.hosts))
    return interface_towards(nodes[(communicator.node_rank + 1) % len(nodes)])
