"""The network that joins the hosts of a list: found from their addresses, then tried from each host to each other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from hvdlm.cluster.doctor.findings import Finding
from hvdlm.cluster.doctor.members import Member
from hvdlm.cluster.doctor.remote import end_probe, next_word, start_probe
from hvdlm.comm.interfaces import Interface, joining_networks

_MOST_NAMED = 4  # failed connections in one finding


@dataclass(frozen=True)
class Route:
    """How hosts are to reach one another: an interface of each, in their order."""

    interfaces: tuple[Interface, ...]

    @property
    def networks(self) -> list[str]:
        """In the notation 10.77.0.0/24; one, unless routers join the hosts."""
        return [str(network) for network in sorted({each.address.network for each in self.interfaces})]

    @property
    def names(self) -> list[str]:
        """Of the interfaces; one, unless hosts name theirs differently."""
        return sorted({each.name for each in self.interfaces})

    @property
    def megabits(self) -> int | None:
        """The speed of the slowest interface, in Mbit/s; None if one is unknown."""
        speeds = [each.megabits for each in self.interfaces]
        return None if None in speeds else min(speed for speed in speeds if speed)

    def __str__(self) -> str:
        return f"{', '.join(self.networks)} ({', '.join(self.names)})"


def possible_routes(members: Sequence[Member]) -> list[Route]:
    """The networks that all have, the best first; where there are none, the addresses to which the names resolve."""
    by_host = [member.report.interfaces for member in members]
    routes = []
    for network in joining_networks(by_host):
        on_network = [[each for each in interfaces if each.address.network == network] for interfaces in by_host]
        routes.append(Route(tuple(max(own, key=lambda each: each.megabits or 0) for own in on_network)))
    if routes:
        return routes
    named = [
        next((each for each in member.report.interfaces if each.address.ip == member.address), None)
        for member in members
    ]
    route = Route(tuple(each for each in named if each))
    return [route] if len(route.interfaces) == len(members) else []


async def usable_routes(members: Sequence[Member], timeout: float) -> tuple[list[Route], list[Finding]]:
    """Routes on which every host has reached every other, the best first, and what is wrong with better ones.

    `members`: two or more; `timeout` in seconds. No route, and a finding that is an error, where there is none.
    """
    routes = possible_routes(members)
    if not routes:
        return [], [_no_route(members)]
    try:
        failures = await asyncio.wait_for(_try(members, routes, timeout), timeout)
    except (asyncio.TimeoutError, EOFError, ConnectionError):
        what = f"the hosts have reported, but not tried {routes[0]} within {timeout:g} s"
        return [], [Finding("error", what, "run doctor again, with a longer --timeout")]
    usable = [route for route, failed in zip(routes, failures, strict=True) if not failed]
    best = routes.index(usable[0]) if usable else len(routes)
    findings = [
        Finding(
            "warning" if usable else "error",
            f"on {route}, {'; '.join(failed[:_MOST_NAMED])}{' and so on' if len(failed) > _MOST_NAMED else ''}",
            "open all TCP ports between the hosts in their firewalls, or repair that network",
        )
        for route, failed in zip(routes[:best], failures[:best], strict=True)
    ]
    return usable, findings


async def _try(members: Sequence[Member], routes: Sequence[Route], timeout: float) -> list[list[str]]:
    """Each host listens, on a port that the kernel chooses, and connects to all others; for each route, who could not.

    Ranks listen on such ports too: a firewall that lets only ssh through shows here, not as a job that hangs.
    """

    def trials(origin: int) -> list[tuple[int, int]]:
        """Numbers of route and target, in the order in which a host tries them."""
        hosts = range(len(members))
        return [(route, target) for route in range(len(routes)) for target in hosts if target != origin]

    task = f"meet {timeout / 6:g}"  # seconds for a connection; all are under way at once
    probes = await asyncio.gather(*(start_probe(member.ssh_name, task, timeout) for member in members))
    try:
        ports = [int(word) for word in await asyncio.gather(*map(next_word, probes))]
        for origin, probe in enumerate(probes):
            assert probe.stdin is not None
            places = [
                (str(routes[route].interfaces[target].address.ip), ports[target]) for route, target in trials(origin)
            ]
            probe.stdin.write(json.dumps(places).encode() + b"\n")
        answers = [json.loads(word) for word in await asyncio.gather(*map(next_word, probes))]
    finally:
        await asyncio.gather(*map(end_probe, probes))
    failures: list[list[str]] = [[] for _ in routes]
    for origin, member in enumerate(members):
        for (route, target), reached in zip(trials(origin), answers[origin], strict=True):
            if not reached:
                address = routes[route].interfaces[target].address.ip
                failures[route].append(f"{member.name} cannot connect to {members[target].name} at {address}")
    return failures


def _no_route(members: Sequence[Member]) -> Finding:
    networks = [
        f"{member.name} has {', '.join(f'{each.address} ({each.name})' for each in member.report.interfaces) or 'none'}"
        for member in members
    ]
    return Finding(
        "error",
        f"no network joins all hosts: {'; '.join(networks)}",
        "give each an address of its own on one network, and start the job on one of them",
    )
