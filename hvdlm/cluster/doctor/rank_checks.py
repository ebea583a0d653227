"""Checks of the ranks of a job, from the reports of all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network
from typing import TypeVar

from hvdlm.cluster.doctor.findings import Finding, counted
from hvdlm.cluster.doctor.host_checks import DOCKER_SHARED_MEMORY
from hvdlm.cluster.doctor.interface_variables import misnamed_interfaces, named_interfaces
from hvdlm.cluster.doctor.rank_report import RankReport, one_rank_per_host
from hvdlm.comm.core_binding import idle_cores, same_cores
from hvdlm.comm.gpus import shared_gpus
from hvdlm.comm.interfaces import joining_networks
from hvdlm.comm.launcher_process import MPI_LAUNCHERS

V = TypeVar("V")

_MIB = 2**20

# Size of the segment that Open MPI creates in /dev/shm for each rank (btl_sm_segment_size).
_OPEN_MPI_SEGMENT = 16 * _MIB
# What NCCL's guide recommends for a container ("Troubleshooting: shared memory").
_NCCL_SHARED_MEMORY = 1024 * _MIB


def check_ranks(reports: list[RankReport]) -> list[Finding]:
    """Runs all checks on the reports of a job's ranks."""
    checks: list[Callable[[list[RankReport]], list[Finding]]] = [
        alone_under_a_launcher,
        different_software,
        different_instructions,
        crowded_cores,
        bound_cores,
        different_gpus,
        unsupported_gpus,
        little_shared_memory,
        uncompiled_codecs,
        wrong_interface_variables,
        slow_networks,
    ]
    return [finding for run in checks for finding in run(reports)]


def alone_under_a_launcher(reports: list[RankReport]) -> list[Finding]:
    """A process that a launcher started, but that runs as a job of one rank: the launcher is of another MPI."""
    (only, *others) = reports
    # The other MPI may set variables that hvdlm does not know, so the launcher is recognised by its process.
    if others or only.launcher != "none" or only.parent not in MPI_LAUNCHERS:
        return []
    what = f"{only.parent} started this process on {only.host}, but it runs as a job of one rank"
    remedy = f"start it with the mpirun of {only.software['MPI']}, with horovodrun, or with srun --mpi=pmix"
    if only.siblings > 1:
        return [Finding("error", f"{what}, as do {only.siblings - 1} more: each takes itself for rank 0", remedy)]
    return [Finding("warning", f"{what}: if there should be more ranks, each takes itself for rank 0", remedy)]


def different_software(reports: list[RankReport]) -> list[Finding]:
    """Software whose version differs between ranks."""
    findings = []
    for subject in reports[0].software:
        by_version = _grouped(reports, [each.software.get(subject, "none") for each in reports])
        if len(by_version) > 1:
            versions = "; ".join(f"{version} on {name_ranks(ranks)}" for version, ranks in by_version.items())
            findings.append(
                Finding("error", f"ranks differ in {subject}: {versions}", "install one version on all hosts")
            )
    return findings


def different_instructions(reports: list[RankReport]) -> list[Finding]:
    """Ranks without GPUs whose CPUs round otherwise, and are seldom as fast as the others."""
    computing = [each for each in reports if not each.gpus]
    by_capability = _grouped(computing, [each.cpu_capability for each in computing])
    if len(by_capability) < 2:
        return []
    kinds = "; ".join(f"{capability} on {name_ranks(ranks)}" for capability, ranks in by_capability.items())
    remedy = (
        "see docs/unequal-ranks.md; parallel.tensor and parallel.pipeline need ATEN_CPU_CAPABILITY set to the least of "
        "these on all ranks (mpirun -x ATEN_CPU_CAPABILITY=avx2)"
    )
    return [Finding("warning", f"PyTorch computes with unlike instructions: {kinds}", remedy)]


def crowded_cores(reports: list[RankReport]) -> list[Finding]:
    """A host with more ranks than cores, or with ranks bound to too few of its cores."""
    findings = []
    for host, ranks in _by_host(reports).items():
        cores = frozenset().union(*(each.launcher_cores | each.cores for each in ranks))
        quotas = [each.usable_cores for each in ranks if 0 < each.usable_cores < len(each.cores)]
        if len(ranks) > (usable := min([len(cores), *quotas])):
            allowed = ", by its CPU quota" if usable < len(cores) else ""
            what = f"{host} has {len(ranks)} ranks and {counted(usable, 'core')} for them{allowed}"
            findings.append(Finding("warning", what, "start fewer ranks there, unless this is only a test"))
            continue
        for bound in sorted({each.cores for each in ranks}, key=lambda each: (len(each), sorted(each))):
            sharing = [each for each in ranks if each.cores <= bound]
            if len(sharing) > len(bound):
                cores_used = f"{counted(len(bound), 'core')} ({number_ranges(bound)}) of {len(cores)}"
                what = f"{name_ranks(sharing)} are bound to {cores_used}"
                findings.append(Finding("error", what, _unbind(sharing[0])))
                break
    return findings


def bound_cores(reports: list[RankReport]) -> list[Finding]:
    """Cores that no rank of a host may use, or that OpenMP gives to several ranks while others are idle."""
    ranks = [each.binding for each in reports]
    problems = same_cores(ranks) + ([] if crowded_cores(reports) else idle_cores(ranks))
    return [Finding("warning", what, remedy) for what, remedy in problems]


def different_gpus(reports: list[RankReport]) -> list[Finding]:
    """Ranks that see different GPUs, a different number of GPUs, or none where others see some."""
    by_gpus = _grouped(reports, [(each.device, len(each.gpus)) for each in reports])
    if len(by_gpus) == 1:
        return []
    seen = "; ".join(
        f"{f'{count} x {name}' if count else 'none'} on {name_ranks(r)}" for (name, count), r in by_gpus.items()
    )
    return [
        Finding(
            "error" if not all(each.gpus for each in reports) else "warning",
            f"ranks see different GPUs: {seen}",
            "check CUDA_VISIBLE_DEVICES and nvidia-smi on these hosts, since all ranks wait for the slowest",
        )
    ]


def unsupported_gpus(reports: list[RankReport]) -> list[Finding]:
    """GPUs whose tensors are copied to host memory for communication, because the engine does not support them."""
    ranks = [each for each in reports if each.gpus and not each.supports_gpus]
    if not ranks or len(reports) == 1:
        return []
    crowded = [host for host, own in _by_host(ranks).items() if shared_gpus([each.gpu_uuids for each in own])]
    why = {
        "mpi": "engine mpi has no CUDA support",
        "horovod": f"Horovod {ranks[0].software['Horovod']} is built without NCCL",
        "torch": f"more ranks than GPUs on {', '.join(crowded)} make NCCL unusable",
    }[ranks[0].engine]
    remedy = {
        "mpi": "set comm.engine to torch, or to horovod where it is built with NCCL",
        "horovod": "run `hvdlm install-horovod` where NCCL's headers are, or set comm.engine to torch",
        "torch": "start one rank for each GPU",
    }[ranks[0].engine]
    return [
        Finding(
            "warning", f"gradients of the GPUs of {name_ranks(ranks)} are copied through host memory: {why}", remedy
        )
    ]


def little_shared_memory(reports: list[RankReport]) -> list[Finding]:
    """A host with less free /dev/shm than its ranks need to communicate through shared memory."""
    findings = []
    for host, ranks in _by_host(reports).items():
        free = min(each.shared_memory for each in ranks)
        needed = max(
            _OPEN_MPI_SEGMENT * len(ranks),
            DOCKER_SHARED_MEMORY,
            _NCCL_SHARED_MEMORY if any(each.gpus for each in ranks) else 0,
        )
        if free < needed:
            what = f"{host} has {free // _MIB} MiB free in /dev/shm, but its ranks need {needed // _MIB} MiB"
            remedy = "remove old files there, or give the container more (docker run --shm-size=1g)"
            findings.append(Finding("error" if free < _OPEN_MPI_SEGMENT * len(ranks) else "warning", what, remedy))
    return findings


def uncompiled_codecs(reports: list[RankReport]) -> list[Finding]:
    """Ranks on which codecs cannot be compiled, or are compiled anew at each start."""
    findings = []
    with_problem = [each for each in reports if each.compiler_problem]
    for problem, ranks in _grouped(with_problem, [each.compiler_problem for each in with_problem]).items():
        is_missing = str(problem).startswith("Numba cannot be imported")
        remedy = (
            "install hvdlm with its requirements, without which it does not train"
            if is_missing
            else "set NUMBA_CACHE_DIR to a directory that can be written; now each start compiles its codec anew"
        )
        what = f"{problem}, on {name_ranks(ranks)}"
        findings.append(Finding("error" if is_missing else "warning", what, remedy))
    return findings


def wrong_interface_variables(reports: list[RankReport]) -> list[Finding]:
    """Variables that name an interface that a host does not have, or one on a network that does not join all hosts."""
    hosts = one_rank_per_host(reports)
    networks = joining_networks([each.interfaces for each in hosts])
    findings = []
    for each in hosts:
        findings += misnamed_interfaces(each.host, each.variables, each.interfaces)
        for variable, value in each.variables.items():
            named = named_interfaces(variable, value, each.interfaces)
            if len(hosts) > 1 and networks and named and not {i.address.network for i in named} & set(networks):
                what = (
                    f"{variable}={value} on {each.host} is on {named[0].address.network}, which does not join all hosts"
                )
                findings.append(
                    Finding("error", what, f"name the interface on {networks[0]}: {_names(hosts, networks[0])}")
                )
    return findings


def slow_networks(reports: list[RankReport]) -> list[Finding]:
    """Nodes that communicate over another network than the fastest one that joins all of them."""
    hosts = one_rank_per_host(reports)
    networks = joining_networks([each.interfaces for each in hosts])
    if len(hosts) == 1 or not networks:
        return []
    best, findings = networks[0], []
    speeds = {network: _slowest(hosts, network) for network in networks}
    used = [each.towards_next_node for each in hosts]
    by_network = _grouped(hosts, [interface.address.network if interface else None for interface in used])
    for network, users in by_network.items():
        names = ", ".join(each.host for each in users)
        if network is None:
            what = f"{names} {'has' if len(users) == 1 else 'have'} no route to the next node by its name"
            findings.append(Finding("warning", what, f"give the hosts their addresses on {best} in /etc/hosts or DNS"))
        elif network not in speeds:
            what = f"{names} would reach the next node on {network}, which does not join all hosts, and not on {best}"
            findings.append(Finding("warning", what, _select_network(hosts, best)))
        elif speeds[network] < speeds[best]:
            what = f"nodes communicate on {network} at {speeds[network]} Mbit/s, but {best} offers {speeds[best]}"
            findings.append(Finding("warning", what, _select_network(hosts, best)))
    return findings


def name_ranks(ranks: Sequence[RankReport]) -> str:
    """ "rank 3 on n1", "ranks 0-3 on n1", "ranks 0-3 on n1 and 4-7 on n2", for a message."""
    by_host = _by_host(ranks)
    groups = [f"{number_ranges({each.rank for each in own})} on {host}" for host, own in by_host.items()]
    return f"rank{'s' if len(ranks) > 1 else ''} {' and '.join(groups)}"


def _by_host(reports: Sequence[RankReport]) -> Mapping[str, list[RankReport]]:
    return _grouped(reports, [each.host for each in reports])


def _grouped(reports: Sequence[RankReport], values: Iterable[V]) -> Mapping[V, list[RankReport]]:
    """Groups reports by their value (one in `values` for each report), in the order in which values first appear."""
    groups: defaultdict[V, list[RankReport]] = defaultdict(list)
    for each, value in zip(reports, values, strict=True):
        groups[value].append(each)
    return groups


def _unbind(rank: RankReport) -> str:
    """How to start ranks that are not bound to cores."""
    if rank.launcher == "mpirun":
        return "start mpirun with --bind-to none"
    if rank.launcher == "srun":
        return "start srun with --cpu-bind=none, or give each task cores with --cpus-per-task"
    return "start the ranks without taskset or numactl, or give each cores of its own"


def _select_network(hosts: Sequence[RankReport], network: IPv4Network) -> str:
    """How to make the engine use a network."""
    names = _names(hosts, network)
    return {
        "mpi": f"mpirun --mca btl_tcp_if_include {network}",
        "horovod": f"horovodrun --network-interfaces {names}, or mpirun --mca btl_tcp_if_include {network}",
    }.get(hosts[0].engine, f"set GLOO_SOCKET_IFNAME={names}")


def _names(hosts: Sequence[RankReport], network: IPv4Network) -> str:
    """The names of the interfaces on a network, on any host, joined by commas."""
    return ",".join(sorted({i.name for each in hosts for i in each.interfaces if i.address.network == network}))


def _slowest(hosts: Sequence[RankReport], network: IPv4Network) -> int:
    """Mbit/s of the slowest host's interface on a network, by which `joining_networks` sorts networks."""
    return min(max(i.megabits or 0 for i in each.interfaces if i.address.network == network) for each in hosts)


def number_ranges(numbers: frozenset[int] | set[int]) -> str:
    """ "0-3,8" for 0, 1, 2, 3 and 8."""
    starts = [number for number in sorted(numbers) if number - 1 not in numbers]
    ends = [number for number in sorted(numbers) if number + 1 not in numbers]
    return ",".join(
        str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)
    )
