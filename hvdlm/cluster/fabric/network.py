"""The network of a fabric: a bridge in a namespace of its own, and one shaped link to each host."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass

from hvdlm.cluster.fabric.programs import enter, run

NETWORK = ipaddress.IPv4Network("10.77.0.0/24")
INTERFACE = "eth0"  # of each host; at the bridge, a link has its host's name

# Token buckets: at least one full-sized segment as the kernel hands it over (64 KiB), and what flows in two
# milliseconds, so that timers of that grain still keep the rate.
_LEAST_BURST = 256 * 1024  # bytes
_BURST_SECONDS = 0.002


@dataclass(frozen=True)
class Link:
    """The state of a link: `rate` in bit/s, None if unlimited."""

    is_up: bool
    rate: int | None


def address(index: int) -> ipaddress.IPv4Address:
    """Of host h1, h2, ..., by its number."""
    return NETWORK[index]


def make_switch() -> None:
    """Turns this process's network namespace, a new one, into the switch between the hosts."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "switch", "type", "bridge")
    run("ip", "link", "set", "switch", "up")


def connect(switch: int, host: int, name: str, index: int) -> None:
    """Joins host `name`, whose namespaces process `host` holds, to the bridge that process `switch` holds."""
    at_switch, at_host = enter(switch, ["net"]), enter(host, ["net"])
    peer = ["peer", "name", INTERFACE, "netns", str(host)]
    run(*at_switch, "ip", "link", "add", name, "type", "veth", *peer)
    run(*at_switch, "ip", "link", "set", name, "master", "switch", "up")
    run(*at_host, "ip", "address", "add", f"{address(index)}/{NETWORK.prefixlen}", "dev", INTERFACE)
    run(*at_host, "ip", "link", "set", "lo", "up")
    run(*at_host, "ip", "link", "set", INTERFACE, "up")


def burst_bytes(rate: int) -> int:
    """What a link of `rate` bit/s that was idle carries at once, before it keeps to its rate."""
    return max(_LEAST_BURST, int(rate / 8 * _BURST_SECONDS))


def shape(switch: int, host: int, name: str, rate: int) -> None:
    """Limits a host's link to `rate` bit/s each way."""
    bucket = ["root", "tbf", "rate", f"{rate}bit", "burst", f"{burst_bytes(rate)}b", "latency", "100ms"]
    run(*enter(host, ["net"]), "tc", "qdisc", "replace", "dev", INTERFACE, *bucket)
    run(*enter(switch, ["net"]), "tc", "qdisc", "replace", "dev", name, *bucket)


def plug(switch: int, name: str, is_up: bool) -> None:
    """Pulls a host's cable out of the switch, or puts it back."""
    run(*enter(switch, ["net"]), "ip", "link", "set", name, "up" if is_up else "down")


def link_of(switch: int, name: str) -> Link:
    """How the link of a host is now."""
    at_switch = enter(switch, ["net"])
    (port,) = json.loads(run(*at_switch, "ip", "-json", "link", "show", "dev", name))
    disciplines = json.loads(run(*at_switch, "tc", "-json", "qdisc", "show", "dev", name))
    rates = [each["options"]["rate"] * 8 for each in disciplines if each["kind"] == "tbf"]  # tc tells bytes/s
    return Link("UP" in port["flags"], rates[0] if rates else None)
