"""Checks of the hosts of a host list, from the list and the reports of their probes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from hvdlm.cluster.doctor.findings import Finding, counted
from hvdlm.cluster.doctor.probed_hosts import ProbedHost
from hvdlm.cluster.doctor.routes import Route

# Bytes of /dev/shm that Docker gives a container by default. NCCL needs more.
DOCKER_SHARED_MEMORY = 64 * 2**20


def same_host_twice(hosts: Sequence[ProbedHost]) -> list[Finding]:
    """Names in the list that have the same address, or all mean this machine."""
    by_address = defaultdict(list)
    for host in hosts:
        if host.address:
            by_address["this machine" if host.is_local else str(host.address)].append(host)
    return [
        Finding(
            "error",
            f"{' and '.join(f'{each.name} (line {each.entry.line})' for each in same)} are one host, {address}",
            "keep one of these lines, with the slots of all",
        )
        for address, same in by_address.items()
        if len(same) > 1
    ]


def missing_slots(hosts: Sequence[ProbedHost]) -> list[Finding]:
    """Lines without slots=, which launchers read differently."""
    return [
        Finding(
            "warning",
            f"line {host.entry.line} gives {host.name} no slots: horovodrun takes 1, mpirun one for each core",
            f"write `{host.name} slots=1`",
        )
        for host in hosts
        if not host.entry.states_slots
    ]


def different_software(hosts: Sequence[ProbedHost]) -> list[Finding]:
    """Software whose version differs from that of most hosts, or is missing everywhere though a job needs it."""
    findings = []
    for subject in hosts[0].report.software if hosts else ():
        versions = [host.report.software[subject] for host in hosts]
        common, _ = Counter(versions).most_common(1)[0]  # the first host's if no version is more common
        odd = [f"{host.name} has {each}" for host, each in zip(hosts, versions, strict=True) if each != common]
        if odd:
            others = ", ".join(host.name for host, each in zip(hosts, versions, strict=True) if each == common)
            what = (
                f"hosts differ in {subject}: {others} {'have' if ',' in others else 'has'} {common}, {', '.join(odd)}"
            )
            findings.append(Finding("error", what, "install one version on all hosts"))
        elif common == "none" and subject == "torch":
            findings.append(Finding("error", "no host has torch", "install hvdlm with its requirements on all hosts"))
    return findings


def missing_resources(hosts: Sequence[ProbedHost]) -> list[Finding]:
    """Hosts with fewer cores or GPUs than ranks, or with little shared memory."""
    findings = []
    some_have_gpus = any(host.report.gpus for host in hosts)
    for host in hosts:
        slots, report = host.entry.slots, host.report
        if slots > report.cores:
            what = f"{host.name} has {slots} slots and {counted(report.cores, 'core')}"
            findings.append(Finding("warning", what, f"write slots={report.cores}, or let ranks share cores"))
        if some_have_gpus and slots > report.gpus:
            what = f"{host.name} has {slots} slots and {counted(report.gpus, 'GPU')}"
            findings.append(Finding("warning", what, f"write slots={report.gpus}, or train on CPUs"))
        if slots and report.shared_memory < DOCKER_SHARED_MEMORY:
            what = f"{host.name} has {report.shared_memory // 2**20} MiB free in /dev/shm, which its ranks need"
            findings.append(Finding("warning", what, "remove old files there, or give the container more (--shm-size)"))
    return findings


def wrong_names(hosts: Sequence[ProbedHost], route: Route) -> list[Finding]:
    """Host names that resolve to addresses outside the route, and interfaces that have different names on the hosts."""
    findings = []
    if len(route.names) > 1:
        what = f"hosts have different names for their interface on {route}, and horovodrun takes one name for all hosts"
        findings.append(Finding("warning", what, "start ranks with mpirun, or give the interfaces one name"))
    for host, interface in zip(hosts, route.interfaces, strict=True):
        address = interface.address.ip
        if host.report.own_address.startswith("127."):
            what = f"{host.name} resolves its own name to {host.report.own_address}, where no other host finds it"
            remedy = f"give {host.report.hostname} the address {address} in /etc/hosts there"
            findings.append(Finding("warning", what, remedy))
        elif host.address and not host.address.is_loopback and host.address not in interface.address.network:
            what = f"{host.name} resolves to {host.address}, not to {address}, its address on {route}"
            remedy = "give its name that address in /etc/hosts or DNS, so that launchers use the same network"
            findings.append(Finding("warning", what, remedy))
    return findings
