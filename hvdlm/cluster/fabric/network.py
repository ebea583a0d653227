"""The network of a fabric: a bridge (the switch) in a namespace of its own, and a link to each host.

`Fabric.up` starts this module as `python -m hvdlm.cluster.fabric.network STATE` in a new network namespace: the process
makes the switch and holds its namespace until it is killed.
"""

from __future__ import annotations

import ipaddress
import json
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hvdlm.cluster.fabric.programs import nsenter, run

NETWORK = ipaddress.IPv4Network("10.77.0.0/24")
INTERFACE = "eth0"  # the host's end of a link; the bridge's end has the name of the host

# Size of the token bucket that limits a rate: room for several full segments of the kernel (64 KiB each), and for what
# flows in two milliseconds, so that the kernel's timers are fine enough to keep the rate.
_MIN_BURST = 256 * 1024  # bytes
_BURST_SECONDS = 0.002

_CARRIER_DEADLINE = 5.0  # seconds; the kernel's link watch looks once a second


@dataclass(frozen=True)
class Link:
    """The state of a link: `rate` in bit/s, None if unlimited."""

    is_up: bool
    rate: int | None


def address(host: str) -> ipaddress.IPv4Address:
    """The address of host "h1", "h2", ..."""
    return NETWORK[int(host.removeprefix("h"))]


def make_switch() -> None:
    """Makes the bridge between the hosts in this process's network namespace, which must be new."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "switch", "type", "bridge")
    run("ip", "link", "set", "switch", "up")


def connect(switch: int, host: int, name: str) -> None:
    """Connects host `name` to the bridge. `host` and `switch`: pids of the processes that hold their namespaces."""
    at_switch, at_host = nsenter(switch, ["net"]), nsenter(host, ["net"])
    peer = ["peer", "name", INTERFACE, "netns", str(host)]
    run(*at_switch, "ip", "link", "add", name, "type", "veth", *peer)
    run(*at_switch, "ip", "link", "set", name, "master", "switch", "up")
    run(*at_host, "ip", "address", "add", f"{address(name)}/{NETWORK.prefixlen}", "dev", INTERFACE)
    run(*at_host, "ip", "link", "set", "lo", "up")
    run(*at_host, "ip", "link", "set", INTERFACE, "up")


def burst_bytes(rate: int) -> int:
    """Bytes that an idle link of `rate` bit/s transmits at once, before the limit takes effect."""
    return max(_MIN_BURST, int(rate / 8 * _BURST_SECONDS))


def limit_rate(switch: int, host: int, name: str, rate: int) -> None:
    """Limits a host's link to `rate` bit/s each way."""
    bucket = ["root", "tbf", "rate", f"{rate}bit", "burst", f"{burst_bytes(rate)}b", "latency", "100ms"]
    run(*nsenter(host, ["net"]), "tc", "qdisc", "replace", "dev", INTERFACE, *bucket)
    run(*nsenter(switch, ["net"]), "tc", "qdisc", "replace", "dev", name, *bucket)


def cut_link(switch: int, name: str) -> None:
    """Takes a host's link down."""
    run(*nsenter(switch, ["net"]), "ip", "link", "set", name, "down")


def heal_link(switch: int, name: str, hosts: Iterable[int]) -> None:
    """Takes the link of host `name` up again and returns when all `hosts` can reach it.

    The kernel finds the carrier a moment later. A host that has asked for the address in vain has no route to it until
    it forgets that.
    """
    run(*nsenter(switch, ["net"]), "ip", "link", "set", name, "up")
    deadline = time.monotonic() + _CARRIER_DEADLINE
    while _port(switch, name)["operstate"] != "UP" and time.monotonic() < deadline:
        time.sleep(0.02)
    for host in hosts:
        run(*nsenter(host, ["net"]), "ip", "neighbour", "flush", "to", str(address(name)), "dev", INTERFACE)


def link_of(switch: int, name: str) -> Link:
    """The present state of a host's link."""
    disciplines = json.loads(run(*nsenter(switch, ["net"]), "tc", "-json", "qdisc", "show", "dev", name))
    rates = [each["options"]["rate"] * 8 for each in disciplines if each["kind"] == "tbf"]  # tc reports bytes/s
    return Link("UP" in _port(switch, name)["flags"], rates[0] if rates else None)


def _port(switch: int, name: str) -> dict[str, Any]:
    """What `ip` says of the bridge's end of a host's link."""
    found: list[dict[str, Any]] = json.loads(run(*nsenter(switch, ["net"]), "ip", "-json", "link", "show", "dev", name))
    return found[0]


if __name__ == "__main__":
    make_switch()
    print("ready", flush=True)
    while True:
        signal.pause()
