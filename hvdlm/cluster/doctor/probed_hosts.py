"""Probes all hosts of a host list at once and collects their reports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

import psutil

from hvdlm.cluster.doctor.findings import Finding
from hvdlm.cluster.doctor.host_probe import LINE_PREFIX, HostReport, read_report
from hvdlm.cluster.doctor.probe_failures import explain_probe_failure
from hvdlm.cluster.doctor.remote_probe import run_probe
from hvdlm.cluster.hostfile import Host
from hvdlm.comm.interfaces import interface_towards


@dataclass(frozen=True)
class ProbedHost:
    """A host that has reported.

    `entry`: its line in the host list. `address`: to which its name resolves here, None if only ssh knows the name.
    """

    entry: Host
    address: IPv4Address | None
    is_local: bool  # it is this machine, so it is probed without ssh
    report: HostReport

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def ssh_name(self) -> str | None:
        """Its name for ssh; None for this machine."""
        return None if self.is_local else self.name


async def probe_hosts(hosts: Sequence[Host], timeout: float) -> tuple[list[ProbedHost], list[Finding]]:
    """Probes all hosts at once, and also this machine, from which the job will be started, if it is not in the list.

    In that case this machine is the last of the hosts and has 0 slots. A host that does not report within `timeout`
    seconds becomes a finding instead.
    """
    addresses = await asyncio.gather(*(_resolve(host.name) for host in hosts))
    are_local = [_is_local(host.name, address) for host, address in zip(hosts, addresses, strict=True)]
    targets = list(zip(hosts, addresses, are_local, strict=True))
    if not any(are_local):
        interface = interface_towards(hosts[0].name)
        targets.append((Host(socket.gethostname(), slots=0, line=0), interface.address.ip if interface else None, True))
    results = await asyncio.gather(*(_probe(*target, timeout) for target in targets))
    return (
        [result for result in results if isinstance(result, ProbedHost)],
        [result for result in results if isinstance(result, Finding)],
    )


async def _probe(host: Host, address: IPv4Address | None, is_local: bool, timeout: float) -> ProbedHost | Finding:
    result = await run_probe(None if is_local else host.name, timeout)
    line = next((line for line in result.output.splitlines() if line.startswith(LINE_PREFIX)), None)
    if result.status != 0 or line is None:
        return explain_probe_failure(host.name, result, timeout)
    try:
        return ProbedHost(host, address, is_local, read_report(line))
    except (ValueError, KeyError, TypeError):
        return Finding("error", f"{host.name} has another version of hvdlm", "install one version on all hosts")


async def _resolve(name: str) -> IPv4Address | None:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, family=socket.AF_INET)
    except (OSError, UnicodeError):  # UnicodeError for a name that cannot be a host's, such as a..b
        return None
    return IPv4Address(found[0][4][0])


def _is_local(name: str, address: IPv4Address | None) -> bool:
    if address is None:
        return name == socket.gethostname()
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    return address.is_loopback or str(address) in own
