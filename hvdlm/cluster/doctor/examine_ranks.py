"""`hvdlm doctor` under a launcher: checks the ranks of a job and measures their communication."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Sequence

import psutil
import torch
from rich.console import Console
from rich.table import Table

from hvdlm.cluster.doctor.findings import Finding, print_findings
from hvdlm.cluster.doctor.interface_variables import interface_variables, misnamed_interfaces
from hvdlm.cluster.doctor.measure import (
    AllReduce,
    PointToPoint,
    measure_all_reduce,
    measure_point_to_point,
    wrong_sums,
)
from hvdlm.cluster.doctor.rank_checks import check_ranks, name_ranks, number_ranges
from hvdlm.cluster.doctor.rank_report import RankReport, gather_reports
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.connect import connect
from hvdlm.comm.interfaces import own_interfaces
from hvdlm.comm.launch import detect
from hvdlm.comm.launcher_output import print_as_launcher
from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.blockwise import LONGEST_BLOCK

logger = logging.getLogger(__name__)

# What a model of so many parameters takes between nodes is said where it is more than so many seconds.
_PARAMETERS = 10_000_000
_LONG = 0.05
_INT4_BYTES = 0.5 + 4 / LONGEST_BLOCK  # of a number, with its share of the scale of its block

# Columns of the output: under mpirun the terminal's own width is unknown.
_WIDTH = 100


def examine_ranks(engine: str, timeout: float) -> int:
    """Examines the job of this rank. Returns the exit status, the same on every rank: 0 if no error was found.

    `timeout`: seconds that a rank waits for another. Raises HvdlmError on a rank that cannot join the job.
    """
    launch = detect(os.environ)
    print_as_launcher(launch)
    variables = interface_variables(os.environ)
    shared_memory = psutil.disk_usage("/dev/shm").free
    torch.set_num_threads(1)  # by default each rank has a thread for every core, which slows down all of them
    try:
        communicator = connect(engine, timeout)
    except HvdlmError as error:
        host = os.uname().nodename
        causes = [f"{each.what}: {each.remedy}" for each in misnamed_interfaces(host, variables, own_interfaces())]
        raise HvdlmError("; ".join([str(error), *causes])) from error
    try:
        reports = gather_reports(communicator, launch.launcher, variables, shared_memory)
        status = _examine(communicator, reports)
        communicator.barrier()  # a launcher may end rank 0 when another rank exits, so all wait until it has printed
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


def _examine(communicator: Communicator, reports: list[RankReport]) -> int:
    console = Console(quiet=communicator.rank != 0, highlight=False, width=_WIDTH, force_terminal=False)
    _print_ranks(console, communicator, reports)
    findings = [*check_ranks(reports), *_check_sums(reports, wrong_sums(communicator))]
    if communicator.size > 1:
        pairs = [measure_point_to_point(communicator, *pair) for pair in _pairs(communicator)]
        _print_speeds(console, communicator, pairs, measure_all_reduce(communicator))
        between = [pair for pair in pairs if len({communicator.hosts[rank] for rank in pair.ranks}) > 1]
        if between and (sentence := exchange_sentence(between[0].bandwidth, communicator.node_count)):
            console.print(sentence, soft_wrap=True)
    return communicator.broadcast_object(print_findings(findings) if communicator.rank == 0 else 0)


def _check_sums(reports: Sequence[RankReport], wrong: Sequence[Sequence[str]]) -> list[Finding]:
    """One finding for each dtype and length that `wrong_sums` returns."""
    findings = []
    for kind in dict.fromkeys(kind for kinds in wrong for kind in kinds):
        ranks = [each for each in reports if kind in wrong[each.rank]]
        what = f"the all-reduce of {kind} gave a wrong sum to {name_ranks(ranks)}"
        remedy = f"do not train with engine {reports[0].engine} here: rebuild it, or use another engine"
        findings.append(Finding("error", what, remedy))
    return findings


def _pairs(communicator: Communicator) -> list[tuple[int, int]]:
    """The pairs to measure: two ranks of one node, and two ranks of different nodes, as far as the job has them.

    An engine without send and receive broadcasts to all ranks instead, so one pair is enough.
    """
    by_host = {host: [r for r, name in enumerate(communicator.hosts) if name == host] for host in communicator.hosts}
    within = [(ranks[0], ranks[1]) for ranks in by_host.values() if len(ranks) > 1][:1]
    firsts = [ranks[0] for ranks in by_host.values()]
    between = [(firsts[0], firsts[1])] if len(firsts) > 1 else []
    return within + between if communicator.supports("send") else (between or within)


def _print_ranks(console: Console, communicator: Communicator, reports: Sequence[RankReport]) -> None:
    size, nodes, launcher = communicator.size, communicator.node_count, reports[0].launcher
    started = f"started by {launcher}" if launcher != "none" else "started by itself"
    console.print(
        f"{size} rank{'s' if size > 1 else ''} on {nodes} node{'s' if nodes > 1 else ''}, {started}, "
        f"engine {communicator.engine}"
    )
    table = Table("rank", "host", "local rank", "device", "cores", "towards the next node")
    for each in reports:
        interface = each.towards_next_node
        towards = f"{interface.name} {interface.address}" if interface else "none" if nodes > 1 else "-"
        table.add_row(str(each.rank), each.host, str(each.local_rank), each.device, number_ranges(each.cores), towards)
    console.print(table)
    for software in dict.fromkeys(tuple(each.software.items()) for each in reports):
        ranks = [each for each in reports if tuple(each.software.items()) == software]
        prefix = "" if len(ranks) == size else f"{name_ranks(ranks)}: "
        versions = (version if name in version else f"{name} {version}" for name, version in software)
        console.print(prefix + ", ".join(versions), soft_wrap=True)


def _print_speeds(
    console: Console, communicator: Communicator, pairs: Sequence[PointToPoint], all_reduce: AllReduce
) -> None:
    table = Table("", "operation", "time", "bandwidth")
    for each in pairs:
        first, second = each.ranks
        one_node = communicator.hosts[first] == communicator.hosts[second]
        ranks = f"{'within a node' if one_node else 'between nodes'}, ranks {first} and {second}"
        table.add_row(ranks, each.operation, _milliseconds(each.latency), _megabits(each.bandwidth))
    operation = f"all-reduce of {all_reduce.nbytes / 2**20:g} MiB, bus bandwidth"
    table.add_row(
        f"all {all_reduce.size} ranks",
        operation,
        _milliseconds(all_reduce.seconds),
        _megabits(all_reduce.bus_bandwidth),
    )
    console.print(table)


def exchange_sentence(bandwidth: float, nodes: int) -> str | None:
    """What gradients take on a link of so many bytes/s if that is long: of a ring, each byte is sent twice but for the
    rank's own part (Patarasuk & Yuan, JPDC 2009, section 3).
    """
    share = 2 * (nodes - 1) / nodes
    dense, int4 = (share * nbytes * _PARAMETERS / bandwidth for nbytes in (4, _INT4_BYTES))
    if dense <= _LONG:
        return None
    return (
        f"gradients of {_PARAMETERS // 10**6}M parameters take {dense:.2g} s between nodes, {int4:.2g} s by int4: "
        "where a step computes for less, see docs/codecs.md and docs/local-steps.md"
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def _megabits(bandwidth: float) -> str:
    return f"{bandwidth * 8 / 1e6:.1f} Mbit/s"
