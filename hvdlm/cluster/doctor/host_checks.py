"""What can be wrong with hosts that have reported, seen from their list and their reports alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from hvdlm.cluster.doctor.findings import Finding
from hvdlm.cluster.doctor.meeting import Route
from hvdlm.cluster.doctor.members import Member

# What Docker gives a container unless told otherwise, and NCCL cannot live on.
_LEAST_SHARED_MEMORY = 64 * 2**20


def same_host_twice(members: Sequence[Member]) -> list[Finding]:
    """Two names in the list that lead to one address, or both to this machine."""
    by_address = defaultdict(list)
    for member in members:
        if member.address:
            by_address["this machine" if member.is_here else str(member.address)].append(member)
    return [
        Finding(
            "error",
            f"{' and '.join(f'{each.name} (line {each.host.line})' for each in same)} are one host, {address}",
            "keep one of these lines, with the slots of all",
        )
        for address, same in by_address.items()
        if len(same) > 1
    ]


def unstated_slots(members: Sequence[Member]) -> list[Finding]:
    return [
        Finding(
            "warning",
            f"line {member.host.line} gives {member.name} no slots: one for horovodrun, one a core for mpirun",
            f"write `{member.name} slots=1`",
        )
        for member in members
        if not member.host.states_slots
    ]


def unlike_software(members: Sequence[Member]) -> list[Finding]:
    """Versions that some hosts have and most have not, and what a job cannot do without."""
    findings = []
    for subject in members[0].report.software if members else ():
        versions = [member.report.software[subject] for member in members]
        common, _ = Counter(versions).most_common(1)[0]  # the first host's where there is no majority
        odd = [f"{member.name} has {each}" for member, each in zip(members, versions, strict=True) if each != common]
        if odd:
            others = ", ".join(member.name for member, each in zip(members, versions, strict=True) if each == common)
            what = (
                f"hosts differ in {subject}: {others} {'have' if ',' in others else 'has'} {common}, {', '.join(odd)}"
            )
            findings.append(Finding("error", what, "install one version on all hosts"))
        elif common == "none" and subject == "torch":
            findings.append(Finding("error", "no host has torch", "install hvdlm with its requirements on all hosts"))
    return findings


def scarce_resources(members: Sequence[Member]) -> list[Finding]:
    """Fewer cores or GPUs than ranks, and little shared memory."""
    findings = []
    some_have_gpus = any(member.report.gpus for member in members)
    for member in members:
        slots, report = member.host.slots, member.report
        if slots > report.cores:
            what = f"{member.name} has {slots} slots and {_count(report.cores, 'core')}"
            findings.append(Finding("warning", what, f"write slots={report.cores}, or let ranks share cores"))
        if some_have_gpus and slots > report.gpus:
            what = f"{member.name} has {slots} slots and {_count(report.gpus, 'GPU')}"
            findings.append(Finding("warning", what, f"write slots={report.gpus}, or train on CPUs"))
        if slots and report.shared_memory < _LEAST_SHARED_MEMORY:
            what = f"{member.name} has {report.shared_memory // 2**20} MiB free in /dev/shm, by which its ranks talk"
            findings.append(Finding("warning", what, "remove old files there, or give a container more (--shm-size)"))
    return findings


def misleading_names(members: Sequence[Member], route: Route) -> list[Finding]:
    """Names of hosts that lead to other addresses than those by which they are to talk; unlike names of interfaces."""
    findings = []
    if len(route.names) > 1:
        what = f"hosts have other names for their interface on {route}, and horovodrun takes one name for all hosts"
        findings.append(Finding("warning", what, "start ranks with mpirun, or give the interfaces one name"))
    for member, interface in zip(members, route.interfaces, strict=True):
        address = interface.address.ip
        if member.report.own_address.startswith("127."):
            what = f"{member.name} resolves its own name to {member.report.own_address}, where no other host finds it"
            remedy = f"give {member.report.hostname} the address {address} in /etc/hosts there"
            findings.append(Finding("warning", what, remedy))
        elif member.address and not member.address.is_loopback and member.address not in interface.address.network:
            what = f"{member.name} resolves to {member.address}, not to {address}, its address on {route}"
            remedy = "let launchers' connections take the same network: give its name that address in /etc/hosts or DNS"
            findings.append(Finding("warning", what, remedy))
    return findings


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
