"""What can be wrong with the ranks of a job, seen from the facts that they have told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Network
from typing import TypeVar

from hvdlm.cluster.doctor.facts import MPI_STARTERS, Facts, first_of_each_host
from hvdlm.cluster.doctor.findings import Finding
from hvdlm.cluster.doctor.interface_variables import misnamed_interfaces, named_interfaces
from hvdlm.comm.interfaces import joining_networks

V = TypeVar("V")

_MIB = 2**20

# Open MPI: each rank lays a segment of that size in /dev/shm (ompi_info --param btl sm: btl_sm_segment_size).
_SEGMENT = 16 * _MIB
# What Docker gives a container unless told otherwise; less than that has been filled by somebody.
_DOCKER_DEFAULT = 64 * _MIB
# NCCL's guide, "Troubleshooting: shared memory", gives a container 1 GiB.
_NCCL = 1024 * _MIB


def check(facts: list[Facts]) -> list[Finding]:
    """Everything that is wrong with these ranks."""
    checks: list[Callable[[list[Facts]], list[Finding]]] = [
        alone_under_a_launcher,
        unlike_software,
        crowded_cores,
        unlike_gpus,
        gpus_out_of_reach,
        little_shared_memory,
        wrong_variables,
        slow_interfaces,
    ]
    return [finding for each in checks for finding in each(facts)]


def alone_under_a_launcher(facts: list[Facts]) -> list[Finding]:
    """Every process takes itself for rank 0: the launcher belongs to another MPI than the one that is loaded."""
    (only, *others) = facts
    # Another MPI than the one loaded here: of its variables we may know none.
    if others or only.launcher != "none" or only.starter not in MPI_STARTERS:
        return []
    what = f"{only.starter} started this process on {only.host}, but it finds itself alone"
    remedy = f"start it with the mpirun of {only.software['MPI']}, with horovodrun, or with srun --mpi=pmix"
    if only.siblings > 1:
        return [Finding("error", f"{what}, as do {only.siblings - 1} more: each takes itself for rank 0", remedy)]
    return [Finding("warning", f"{what}: if there should be more ranks, each takes itself for rank 0", remedy)]


def unlike_software(facts: list[Facts]) -> list[Finding]:
    """Versions that are not the same on all ranks."""
    findings = []
    for subject in facts[0].software:
        by_version = _grouped(facts, [each.software.get(subject, "none") for each in facts])
        if len(by_version) > 1:
            versions = "; ".join(f"{version} on {who(ranks)}" for version, ranks in by_version.items())
            findings.append(
                Finding("error", f"ranks differ in {subject}: {versions}", "install one version on all hosts")
            )
    return findings


def crowded_cores(facts: list[Facts]) -> list[Finding]:
    """More ranks than cores on a host; or ranks bound to fewer cores than they are, while others idle."""
    findings = []
    for host, ranks in _by_host(facts).items():
        cores = frozenset().union(*(each.cores_of_job | each.cores for each in ranks))
        if len(ranks) > len(cores):
            what = f"{host} has {len(ranks)} ranks and {_count(len(cores), 'core')} for them"
            findings.append(Finding("warning", what, "start fewer ranks there, unless this is only a rehearsal"))
            continue
        for bound in sorted({each.cores for each in ranks}, key=lambda each: (len(each), sorted(each))):
            crowd = [each for each in ranks if each.cores <= bound]
            if len(crowd) > len(bound):
                what = f"{who(crowd)} are bound to {_count(len(bound), 'core')} ({ranges(bound)}) of {len(cores)}"
                findings.append(Finding("error", what, _unbind(crowd[0])))
                break
    return findings


def unlike_gpus(facts: list[Facts]) -> list[Finding]:
    """Ranks that see GPUs beside ranks that see none, others, or another number of them."""
    by_gpus = _grouped(facts, [(each.device, len(each.gpus)) for each in facts])
    if len(by_gpus) == 1:
        return []
    seen = "; ".join(f"{f'{count} x {name}' if count else 'none'} on {who(r)}" for (name, count), r in by_gpus.items())
    return [
        Finding(
            "error" if not all(each.gpus for each in facts) else "warning",
            f"ranks see different GPUs: {seen}",
            "look at CUDA_VISIBLE_DEVICES and at nvidia-smi on these hosts: all ranks wait for the slowest",
        )
    ]


def gpus_out_of_reach(facts: list[Facts]) -> list[Finding]:
    """GPUs whose tensors the engine copies through host memory on the way to other ranks."""
    ranks = [each for each in facts if each.gpus and not each.reaches_gpus]
    if not ranks or len(facts) == 1:
        return []
    crowded = [host for host, own in _by_host(ranks).items() if len(own) > len(own[0].gpus)]
    why = {
        "mpi": "engine mpi has no CUDA support",
        "horovod": f"Horovod {ranks[0].software['Horovod']} is built without NCCL",
        "torch": f"more ranks than GPUs on {', '.join(crowded)} keep NCCL out",
    }[ranks[0].engine]
    remedy = {
        "mpi": "set comm.engine to torch, or to horovod where it is built with NCCL",
        "horovod": "run `hvdlm install-horovod` where NCCL's headers are, or set comm.engine to torch",
        "torch": "start one rank a GPU",
    }[ranks[0].engine]
    return [Finding("warning", f"gradients leave the GPUs of {who(ranks)} by way of host memory: {why}", remedy)]


def little_shared_memory(facts: list[Facts]) -> list[Finding]:
    """A /dev/shm, by which ranks of a host talk, that is smaller than what they lay there."""
    findings = []
    for host, ranks in _by_host(facts).items():
        free = min(each.shared_memory for each in ranks)
        needed = max(_SEGMENT * len(ranks), _DOCKER_DEFAULT, _NCCL if any(each.gpus for each in ranks) else 0)
        if free < needed:
            what = (
                f"{host} has {free // _MIB} MiB free in /dev/shm, less than {needed // _MIB}, by which its ranks talk"
            )
            remedy = "remove old files there, or give a container more (docker run --shm-size=1g)"
            findings.append(Finding("error" if free < _SEGMENT * len(ranks) else "warning", what, remedy))
    return findings


def wrong_variables(facts: list[Facts]) -> list[Finding]:
    """Variables that name an interface which a host does not have, or which leads to no other host."""
    hosts = first_of_each_host(facts)
    networks = joining_networks([each.interfaces for each in hosts])
    findings = []
    for each in hosts:
        findings += misnamed_interfaces(each.host, each.variables, each.interfaces)
        for variable, value in each.variables.items():
            named = named_interfaces(value, each.interfaces)
            if len(hosts) > 1 and networks and named and not {i.address.network for i in named} & set(networks):
                what = (
                    f"{variable}={value} on {each.host} is on {named[0].address.network}, which does not join all hosts"
                )
                findings.append(Finding("error", what, f"name the one on {networks[0]}: {_names(hosts, networks[0])}"))
    return findings


def slow_interfaces(facts: list[Facts]) -> list[Finding]:
    """Nodes that talk over another network than the fastest that joins them all."""
    hosts = first_of_each_host(facts)
    networks = joining_networks([each.interfaces for each in hosts])
    if len(hosts) == 1 or not networks:
        return []
    best, findings = networks[0], []
    speeds = {network: _slowest(hosts, network) for network in networks}
    ways = [each.towards_next_node for each in hosts]
    by_network = _grouped(hosts, [way.address.network if way else None for way in ways])
    for network, users in by_network.items():
        names = ", ".join(each.host for each in users)
        if network is None:
            what = f"{names} {'knows' if len(users) == 1 else 'know'} no way to the next node by its name"
            findings.append(Finding("warning", what, f"give the hosts their addresses on {best} in /etc/hosts or DNS"))
        elif network not in speeds:
            what = f"{names} would reach the next node on {network}, which does not join all hosts, and not on {best}"
            findings.append(Finding("warning", what, _choose(hosts, best)))
        elif speeds[network] < speeds[best]:
            what = f"nodes talk on {network} at {speeds[network]} Mbit/s, though {best} joins them at {speeds[best]}"
            findings.append(Finding("warning", what, _choose(hosts, best)))
    return findings


def who(ranks: Sequence[Facts]) -> str:
    """ "rank 3 on n1", "ranks 0-3 on n1", "ranks 0-3 on n1 and 4-7 on n2", for a sentence."""
    by_host = _by_host(ranks)
    places = [f"{ranges({each.rank for each in own})} on {host}" for host, own in by_host.items()]
    return f"rank{'s' if len(ranks) > 1 else ''} {' and '.join(places)}"


def _by_host(facts: Sequence[Facts]) -> Mapping[str, list[Facts]]:
    return _grouped(facts, [each.host for each in facts])


def _grouped(facts: Sequence[Facts], values: Iterable[V]) -> Mapping[V, list[Facts]]:
    """Ranks by what they have of `values`, one for each, in the order in which these appear."""
    groups: defaultdict[V, list[Facts]] = defaultdict(list)
    for each, value in zip(facts, values, strict=True):
        groups[value].append(each)
    return groups


def _unbind(rank: Facts) -> str:
    if rank.launcher == "mpirun":
        return "start mpirun with --bind-to none"
    if rank.launcher == "srun":
        return "start srun with --cpu-bind=none, or give each task cores with --cpus-per-task"
    return "start the ranks without taskset or numactl, or give each cores of its own"


def _choose(hosts: Sequence[Facts], network: IPv4Network) -> str:
    names = _names(hosts, network)
    return {
        "mpi": f"mpirun --mca btl_tcp_if_include {network}",
        "horovod": f"horovodrun --network-interfaces {names}, or mpirun --mca btl_tcp_if_include {network}",
    }.get(hosts[0].engine, f"set GLOO_SOCKET_IFNAME={names}")


def _names(hosts: Sequence[Facts], network: IPv4Network) -> str:
    """Of the interfaces on a network, on any host."""
    return ",".join(sorted({i.name for each in hosts for i in each.interfaces if i.address.network == network}))


def _slowest(hosts: Sequence[Facts], network: IPv4Network) -> int:
    """Mbit/s of the slowest host's interface on a network, as `joining_networks` ranks them."""
    return min(max(i.megabits or 0 for i in each.interfaces if i.address.network == network) for each in hosts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def ranges(numbers: frozenset[int] | set[int]) -> str:
    """ "0-3,8" for 0, 1, 2, 3 and 8."""
    starts = [number for number in sorted(numbers) if number - 1 not in numbers]
    ends = [number for number in sorted(numbers) if number + 1 not in numbers]
    return ",".join(
        str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)
    )
