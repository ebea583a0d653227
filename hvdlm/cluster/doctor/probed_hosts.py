"""The hosts of a list as doctor meets them: who can be reached, and what each has to say of itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

import psutil

from hvdlm.cluster.doctor.failures import explain
from hvdlm.cluster.doctor.findings import Finding
from hvdlm.cluster.doctor.host_probe import MARK, HostReport, read_report
from hvdlm.cluster.doctor.remote import run_probe
from hvdlm.cluster.hostfile import Host
from hvdlm.comm.interfaces import interface_towards


@dataclass(frozen=True)
class Member:
    """A host that has reported; `address`: to which its name resolves here, None where only ssh knows it."""

    host: Host
    address: IPv4Address | None
    is_here: bool  # reached without ssh: it is this machine
    report: HostReport

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def ssh_name(self) -> str | None:
        return None if self.is_here else self.name


async def visit(hosts: Sequence[Host], timeout: float) -> tuple[list[Member], list[Finding]]:
    """Asks all hosts at once, and this machine too, from which the job is to be started, if it is not among them.

    Such a machine comes last, with no slots. A host that does not report within `timeout` seconds is a finding.
    """
    addresses = await asyncio.gather(*(_resolve(host.name) for host in hosts))
    here = [_is_here(host.name, address) for host, address in zip(hosts, addresses, strict=True)]
    places = list(zip(hosts, addresses, here, strict=True))
    if not any(here):
        towards = interface_towards(hosts[0].name)
        places.append((Host(socket.gethostname(), slots=0, line=0), towards.address.ip if towards else None, True))
    answers = await asyncio.gather(*(_visit(*place, timeout) for place in places))
    return (
        [answer for answer in answers if isinstance(answer, Member)],
        [answer for answer in answers if isinstance(answer, Finding)],
    )


async def _visit(host: Host, address: IPv4Address | None, is_here: bool, timeout: float) -> Member | Finding:
    outcome = await run_probe(None if is_here else host.name, timeout)
    line = next((line for line in outcome.output.splitlines() if line.startswith(MARK)), None)
    if outcome.status != 0 or line is None:
        return explain(host.name, outcome, timeout)
    try:
        return Member(host, address, is_here, read_report(line))
    except (ValueError, KeyError, TypeError):
        return Finding("error", f"{host.name} has another version of hvdlm", "install one version on all hosts")


async def _resolve(name: str) -> IPv4Address | None:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, family=socket.AF_INET)
    except (OSError, UnicodeError):  # the latter for a name that can be none, as a..b
        return None
    return IPv4Address(found[0][4][0])


def _is_here(name: str, address: IPv4Address | None) -> bool:
    if address is None:
        return name == socket.gethostname()
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    return address.is_loopback or str(address) in own
