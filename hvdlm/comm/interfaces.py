"""Network interfaces: which a host has, which networks join a set of hosts, which one leads to a given host."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import psutil


@dataclass(frozen=True)
class Interface:
    """An address of a network interface; `megabits`: its speed in Mbit/s where the kernel knows it."""

    name: str
    address: IPv4Interface
    megabits: int | None


def own_interfaces() -> list[Interface]:
    """Every IPv4 address of this host on an interface that is up, but the loopback's; by name."""
    states = psutil.net_if_stats()
    return [
        Interface(name, IPv4Interface(f"{entry.address}/{entry.netmask or 32}"), states[name].speed or None)
        for name, entries in sorted(psutil.net_if_addrs().items())
        if name in states and states[name].isup and name != "lo"
        for entry in entries
        if entry.family == socket.AF_INET
    ]


def joining_networks(interfaces_by_host: Sequence[Sequence[Interface]]) -> list[IPv4Network]:
    """Networks on which every host has an address of its own, the best first: that whose slowest interface is fastest.

    A network on which two hosts have the same address joins nobody: docker0 and virbr0 are private to each host and
    look alike on all.
    """
    speeds: dict[IPv4Network, int] = {}
    for network in {interface.address.network for interfaces in interfaces_by_host for interface in interfaces}:
        members = [
            [each for each in interfaces if each.address.network == network] for interfaces in interfaces_by_host
        ]
        addresses = [address for own in members for address in {each.address.ip for each in own}]
        if all(members) and len(addresses) == len(set(addresses)):
            speeds[network] = min(max(each.megabits or 0 for each in own) for own in members)
    return sorted(speeds, key=lambda network: (-speeds[network], network))


def interface_towards(host_or_address: str) -> Interface | None:
    """This host's interface by which the kernel would reach another host; None where it knows no way but itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host_or_address, 9))  # chooses a route; a datagram socket sends nothing at this
        except (OSError, UnicodeError):  # the name does not resolve, cannot be one, or no route
            return None
        own = probe.getsockname()[0]
    return next((each for each in own_interfaces() if str(each.address.ip) == own), None)


def address_beside(host: str) -> str | None:
    """This host's IPv4 address on the network of another one's; None if it has none there.

    An empty name and 0.0.0.0, which are of any host, come back as they are.
    """
    try:
        other = IPv4Address(socket.gethostbyname(host))
    except (OSError, UnicodeError):  # it does not resolve, or is an IPv6 address
        return None
    if other.is_unspecified:
        return host
    return next((str(each.address.ip) for each in own_interfaces() if other in each.address.network), None)
