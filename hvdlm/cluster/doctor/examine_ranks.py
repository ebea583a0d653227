"""`hvdlm doctor` under a launcher: ranks say who they are, try what training will do, and say what is wrong."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Sequence

import psutil
import torch
from rich.console import Console
from rich.table import Table

from hvdlm.cluster.doctor.checks import check, ranges, who
from hvdlm.cluster.doctor.facts import Facts, gather_facts
from hvdlm.cluster.doctor.findings import Finding, tell
from hvdlm.cluster.doctor.interface_variables import interface_variables, misnamed_interfaces
from hvdlm.cluster.doctor.measure import AllReduce, Exchange, measure_all_reduce, measure_exchange, wrong_sums
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.interfaces import own_interfaces
from hvdlm.comm.launch import connect, detect
from hvdlm.errors import HvdlmError

logger = logging.getLogger(__name__)

# Columns of what rank 0 prints: its output may be a terminal of mpirun's making, which says nothing of the user's.
_WIDTH = 100


def examine_ranks(engine: str, timeout: float) -> int:
    """Examines the job of which this process is a rank; the exit status, on every rank: 0 if it should run, else 1.

    `timeout`: seconds that a rank waits for another. Raises HvdlmError on a rank that cannot join the job.
    """
    launch = detect(os.environ)
    variables = interface_variables(os.environ)
    shared_memory = psutil.disk_usage("/dev/shm").free
    torch.set_num_threads(1)  # by default each rank has one a core, and they fight for the cores
    try:
        communicator = connect(engine, timeout)
    except HvdlmError as error:
        host = os.uname().nodename
        causes = [f"{each.what}: {each.remedy}" for each in misnamed_interfaces(host, variables, own_interfaces())]
        raise HvdlmError("; ".join([str(error), *causes])) from error
    try:
        facts = gather_facts(communicator, launch.launcher, variables, shared_memory)
        status = _examine(communicator, facts)
        communicator.barrier()  # rank 0 has spoken before any rank's exit makes the launcher end it
        communicator.close()
        return status
    except HvdlmError as error:
        if communicator.size == 1:
            raise
        communicator.abort(f"hvdlm: error: {error}")
    except Exception:
        if communicator.size == 1:
            raise
        communicator.abort(f"rank {communicator.rank} met a bug in hvdlm:\n{traceback.format_exc()}")


def _examine(communicator: Communicator, facts: list[Facts]) -> int:
    console = Console(quiet=communicator.rank != 0, highlight=False, width=_WIDTH, force_terminal=False)
    _print_ranks(console, communicator, facts)
    findings = [*check(facts), *_check_sums(facts, wrong_sums(communicator))]
    if communicator.size > 1:
        exchanges = [measure_exchange(communicator, *pair) for pair in _pairs(communicator)]
        _print_speeds(console, communicator, exchanges, measure_all_reduce(communicator))
    return communicator.broadcast_object(tell(findings) if communicator.rank == 0 else 0)


def _check_sums(facts: Sequence[Facts], wrong: Sequence[Sequence[str]]) -> list[Finding]:
    """What `wrong_sums` found, as findings: one for each kind of sum."""
    findings = []
    for kind in dict.fromkeys(kind for kinds in wrong for kind in kinds):
        ranks = [each for each in facts if kind in wrong[each.rank]]
        what = f"the all-reduce of {kind} gave a wrong sum to {who(ranks)}"
        remedy = f"do not train with engine {facts[0].engine} here: build it anew, or take another"
        findings.append(Finding("error", what, remedy))
    return findings


def _pairs(communicator: Communicator) -> list[tuple[int, int]]:
    """The first two ranks of the first node that has two, and the first ranks of two nodes.

    Without messages between two ranks, every exchange is a broadcast to all: one is enough.
    """
    by_host = {host: [r for r, name in enumerate(communicator.hosts) if name == host] for host in communicator.hosts}
    within = [(ranks[0], ranks[1]) for ranks in by_host.values() if len(ranks) > 1][:1]
    firsts = [ranks[0] for ranks in by_host.values()]
    between = [(firsts[0], firsts[1])] if len(firsts) > 1 else []
    return within + between if communicator.supports("send") else (between or within)


def _print_ranks(console: Console, communicator: Communicator, facts: Sequence[Facts]) -> None:
    size, nodes, launcher = communicator.size, communicator.node_count, facts[0].launcher
    started = f"started by {launcher}" if launcher != "none" else "started by itself"
    console.print(
        f"{size} rank{'s' if size > 1 else ''} on {nodes} node{'s' if nodes > 1 else ''}, {started}, "
        f"engine {communicator.engine}"
    )
    table = Table("rank", "host", "local rank", "device", "cores", "towards the next node")
    for each in facts:
        interface = each.towards_next_node
        way = f"{interface.name} {interface.address}" if interface else "none" if nodes > 1 else "-"
        table.add_row(str(each.rank), each.host, str(each.local_rank), each.device, ranges(each.cores), way)
    console.print(table)
    for software in dict.fromkeys(tuple(each.software.items()) for each in facts):
        ranks = [each for each in facts if tuple(each.software.items()) == software]
        place = "" if len(ranks) == size else f"{who(ranks)}: "
        versions = (version if name in version else f"{name} {version}" for name, version in software)
        console.print(place + ", ".join(versions), soft_wrap=True)


def _print_speeds(
    console: Console, communicator: Communicator, exchanges: Sequence[Exchange], all_reduce: AllReduce
) -> None:
    table = Table("", "operation", "time", "bandwidth")
    for each in exchanges:
        first, second = each.ranks
        one_node = communicator.hosts[first] == communicator.hosts[second]
        place = f"{'within a node' if one_node else 'between nodes'}, ranks {first} and {second}"
        table.add_row(place, each.operation, _milliseconds(each.latency), _megabits(each.bandwidth))
    operation = f"all-reduce of {all_reduce.nbytes / 2**20:g} MiB, bus bandwidth"
    place = f"all {all_reduce.size} ranks"
    table.add_row(place, operation, _milliseconds(all_reduce.seconds), _megabits(all_reduce.bus_bandwidth))
    console.print(table)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def _megabits(bandwidth: float) -> str:
    return f"{bandwidth * 8 / 1e6:.1f} Mbit/s"
