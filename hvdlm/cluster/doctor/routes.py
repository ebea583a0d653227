"""Finds the networks on which all hosts of a list can connect to each other.

Candidates come from the hosts' addresses; then every host connects to every other host.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from hvdlm.cluster.doctor.findings import Finding
from hvdlm.cluster.doctor.probed_hosts import ProbedHost
from hvdlm.cluster.doctor.remote_probe import end_probe, read_line, start_probe
from hvdlm.comm.interfaces import Interface, joining_networks

_MAX_LISTED = 4  # failed connections in one finding


@dataclass(frozen=True)
class Route:
    """One interface of each host, in the order of the hosts, through which they connect to each other."""

    interfaces: tuple[Interface, ...]

    @property
    def networks(self) -> list[str]:
        """The networks of the interfaces, such as 10.77.0.0/24; more than one only if routers connect the hosts."""
        return [str(network) for network in sorted({each.address.network for each in self.interfaces})]

    @property
    def names(self) -> list[str]:
        """The names of the interfaces; more than one only if hosts name their interfaces differently."""
        return sorted({each.name for each in self.interfaces})

    @property
    def megabits(self) -> int | None:
        """The speed of the slowest interface, in Mbit/s; None if the speed of one is unknown."""
        speeds = [each.megabits for each in self.interfaces]
        return None if None in speeds else min(speed for speed in speeds if speed)

    def __str__(self) -> str:
        return f"{', '.join(self.networks)} ({', '.join(self.names)})"


def possible_routes(hosts: Sequence[ProbedHost]) -> list[Route]:
    """A route for each network that joins all hosts, the fastest first.

    Without such a network: one route with the interfaces to whose addresses the names of the hosts resolve, if any.
    """
    by_host = [host.report.interfaces for host in hosts]
    routes = []
    for network in joining_networks(by_host):
        on_network = [[each for each in interfaces if each.address.network == network] for interfaces in by_host]
        routes.append(Route(tuple(max(own, key=lambda each: each.megabits or 0) for own in on_network)))
    if routes:
        return routes
    named = [next((each for each in host.report.interfaces if each.address.ip == host.address), None) for host in hosts]
    route = Route(tuple(each for each in named if each))
    return [route] if len(route.interfaces) == len(hosts) else []


async def usable_routes(hosts: Sequence[ProbedHost], timeout: float) -> tuple[list[Route], list[Finding]]:
    """The routes on which every host could connect to every other, the fastest first, and findings on faster ones.

    `hosts`: two or more; `timeout` in seconds. If there is no such route, one of the findings is an error.
    """
    routes = possible_routes(hosts)
    if not routes:
        return [], [_no_route(hosts)]
    try:
        failures = await asyncio.wait_for(_test_connections(hosts, routes, timeout), timeout)
    except (asyncio.TimeoutError, EOFError, ConnectionError):
        what = f"the hosts have not finished testing the connections on {routes[0]} within {timeout:g} s"
        return [], [Finding("error", what, "run doctor again, with a longer --timeout")]
    usable = [route for route, failed in zip(routes, failures, strict=True) if not failed]
    best = routes.index(usable[0]) if usable else len(routes)
    findings = [
        Finding(
            "warning" if usable else "error",
            f"on {route}, {'; '.join(failed[:_MAX_LISTED])}{' and so on' if len(failed) > _MAX_LISTED else ''}",
            "open all TCP ports between the hosts in their firewalls, or repair that network",
        )
        for route, failed in zip(routes[:best], failures[:best], strict=True)
    ]
    return usable, findings


async def _test_connections(hosts: Sequence[ProbedHost], routes: Sequence[Route], timeout: float) -> list[list[str]]:
    """Each host listens on a port that the kernel chooses and connects to all others; for each route, the failures.

    Ranks listen on such ports too. So a firewall that allows only ssh is found here, not by a job that hangs.
    """

    def connections(origin: int) -> list[tuple[int, int]]:
        """The indices of route and target of each connection that host `origin` makes, in order."""
        indices = range(len(hosts))
        return [(route, target) for route in range(len(routes)) for target in indices if target != origin]

    task = f"connect {timeout / 6:g}"  # seconds for each connection; a host makes all of its connections at once
    probes = await asyncio.gather(*(start_probe(host.ssh_name, task, timeout) for host in hosts))
    try:
        ports = [int(line) for line in await asyncio.gather(*map(read_line, probes))]
        for origin, probe in enumerate(probes):
            assert probe.stdin is not None
            targets = [
                (str(routes[route].interfaces[target].address.ip), ports[target])
                for route, target in connections(origin)
            ]
            probe.stdin.write(json.dumps(targets).encode() + b"\n")
        answers = [json.loads(line) for line in await asyncio.gather(*map(read_line, probes))]
    finally:
        await asyncio.gather(*map(end_probe, probes))
    failures: list[list[str]] = [[] for _ in routes]
    for origin, host in enumerate(hosts):
        for (route, target), connected in zip(connections(origin), answers[origin], strict=True):
            if not connected:
                address = routes[route].interfaces[target].address.ip
                failures[route].append(f"{host.name} cannot connect to {hosts[target].name} at {address}")
    return failures


def _no_route(hosts: Sequence[ProbedHost]) -> Finding:
    networks = [
        f"{host.name} has {', '.join(f'{each.address} ({each.name})' for each in host.report.interfaces) or 'none'}"
        for host in hosts
    ]
    return Finding(
        "error",
        f"no network joins all hosts: {'; '.join(networks)}",
        "give each an address of its own on one network, and start the job on one of them",
    )
