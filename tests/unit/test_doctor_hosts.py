"""`hvdlm doctor --hostfile` on made-up reports and ssh errors; test_doctor_hostfile.py has real ones."""

from __future__ import annotations

import asyncio
import json
import platform
import socket
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import pytest

from hvdlm.cluster.doctor.findings import Finding, print_findings
from hvdlm.cluster.doctor.host_checks import (
    different_software,
    missing_resources,
    missing_slots,
    same_host_twice,
    wrong_names,
)
from hvdlm.cluster.doctor.host_probe import LINE_PREFIX, HostReport, read_report
from hvdlm.cluster.doctor.launch_commands import launch_commands
from hvdlm.cluster.doctor.probe_failures import explain_probe_failure
from hvdlm.cluster.doctor.probed_hosts import ProbedHost
from hvdlm.cluster.doctor.remote_probe import ProbeResult, run_probe
from hvdlm.cluster.doctor.routes import Route, possible_routes
from hvdlm.cluster.doctor.software import installed_software
from hvdlm.cluster.hostfile import Host
from hvdlm.comm.interfaces import Interface

SOFTWARE = {"torch": "2.9.0", "Horovod": "0.28.1 (Gloo, MPI)", "MPI": "Open MPI 5.0.11"}


def probed(number: int, slots: int = 4, interface: str = "eth0", **report: object) -> ProbedHost:
    """Host h1, h2, ...: the first is this machine."""
    fields: dict[str, object] = {
        "hostname": f"h{number}",
        "own_address": f"10.0.0.{number}",
        "software": SOFTWARE,
        "interfaces": [Interface(interface, IPv4Interface(f"10.0.0.{number}/24"), 1000)],
        "cores": 8,
        "gpus": 0,
        "shared_memory": 2**30,
        "programs": {"hvdlm": "", "prted": ""},
    }
    address = IPv4Address(f"10.0.0.{number}")
    return ProbedHost(Host(f"h{number}", slots, number), address, number == 1, HostReport(**{**fields, **report}))  # type: ignore[arg-type]


def route_of(*hosts: ProbedHost) -> Route:
    return Route(tuple(each.report.interfaces[0] for each in hosts))


def test_findings_are_printed_errors_first(capsys: pytest.CaptureFixture[str]) -> None:
    slow, broken = Finding("warning", "a is slow", "wait"), Finding("error", "b is broken", "mend it")
    assert print_findings([slow, broken, slow]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "error: b is broken: mend it",
        "warning: a is slow: wait",
        "warning: a is slow: wait",
    ]
    assert print_findings([slow]) == 0
    capsys.readouterr()
    assert print_findings([]) == 0
    assert capsys.readouterr().out == "nothing was found wrong\n"


CHANGED_KEY = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@\r
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\r
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@\r
Offending ED25519 key in /home/ann/.ssh/known_hosts:7\r
Host key verification failed.\r
"""
OPEN_KEY = """\
@         WARNING: UNPROTECTED PRIVATE KEY FILE!          @
Permissions 0644 for '/home/ann/.ssh/id_rsa' are too open.
ann@h2: Permission denied (publickey).
"""


@pytest.mark.parametrize(
    ("status", "errors", "what", "remedy"),
    [
        (
            255,
            "ssh: Could not resolve hostname h2: Name or service not known",
            "name h2 does not resolve",
            "/etc/hosts",
        ),
        (255, CHANGED_KEY, "host key of h2 has changed", "`ssh-keygen -R h2 -f /home/ann/.ssh/known_hosts`"),
        (255, "Host key verification failed.\r", "host key of h2 is unknown", "`ssh h2` once by hand"),
        (255, OPEN_KEY, "does not use the private key /home/ann/.ssh/id_rsa", "`chmod 600 /home/ann/.ssh/id_rsa`"),
        (255, "ann@h2: Permission denied (publickey,password).", "h2 does not take your ssh key", "`ssh-copy-id h2`"),
        (255, "ssh: connect to host h2 port 22: Connection refused", "h2 runs no sshd", "name the port"),
        (255, "ssh: connect to host h2 port 22: No route to host", "no route to h2", "check that it is up"),
        (255, "ssh: connect to host h2 port 22: Connection timed out", "h2 does not answer", "firewall"),
        (255, "Connection timed out during banner exchange", "h2 does not answer", "firewall"),
        (
            255,
            "kex_exchange_identification: Connection closed by remote host",
            "sshd on h2 closes the connection",
            "MaxStartups",
        ),
        (255, "a banner\nbad things happen", "ssh to h2 fails (bad things happen)", "`ssh -o BatchMode=yes h2 true`"),
        (255, "", "ssh to h2 fails (nothing)", "`ssh -o BatchMode=yes h2 true`"),
        (None, "", "h2 has not answered within 20 s", "`ssh -v h2 true`"),
        (124, "", "Python on h2 has not answered within 20 s", "--timeout"),
        (137, "", "Python on h2 has not answered within 20 s", "--timeout"),
        (127, "env: 'python': No such file or directory", "there is no Python at ", "same path on every host"),
        (126, "env: Exec format error", "cannot be run on h2 (env: Exec format error)", "same path on every host"),
        (1, "python: No module named 'hvdlm'", "Python on h2 has no hvdlm", "what is installed here"),
        (1, "ModuleNotFoundError: No module named 'psutil'", "Python on h2 has no psutil", "what is installed here"),
        (3, "what now", "the probe on h2 ends with exit status 3 (what now)", "`ssh h2 hvdlm --version`"),
    ],
)
def test_why_a_host_did_not_report(status: int | None, errors: str, what: str, remedy: str) -> None:
    finding = explain_probe_failure("h2", ProbeResult(status, "", errors), 20)
    assert finding.severity == "error"
    assert "h2" in finding.what
    assert what in finding.what
    assert remedy in finding.remedy
    assert "\n" not in finding.what + finding.remedy


def test_the_probe_of_this_machine() -> None:
    outcome = asyncio.run(run_probe(None, 20))
    assert outcome.status == 0, outcome.errors
    assert outcome.output.startswith(LINE_PREFIX)
    report = read_report(outcome.output)
    assert report.hostname == socket.gethostname()
    assert report.software == installed_software()
    assert report.software["Python"] == platform.python_version()
    assert all(isinstance(each.address, IPv4Interface) for each in report.interfaces)


@pytest.mark.parametrize("line", ["", "{}", "[]", json.dumps({"interfaces": [], "hostname": "h1"})])
def test_reports_of_another_version(line: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_report(LINE_PREFIX + line)


def test_software_that_differs() -> None:
    assert different_software([probed(1), probed(2)]) == []
    older = {**SOFTWARE, "torch": "2.8.0"}
    (finding,) = different_software([probed(1, software=older), probed(2), probed(3)])
    assert (finding.severity, finding.what) == ("error", "hosts differ in torch: h2, h3 have 2.9.0, h1 has 2.8.0")
    (finding,) = different_software([probed(1), probed(2, software=older)])
    assert finding.what == "hosts differ in torch: h1 has 2.9.0, h2 has 2.8.0"
    none = {**SOFTWARE, "torch": "none", "Horovod": "none"}
    assert [each.what for each in different_software([probed(1, software=none)])] == ["no host has torch"]


def test_missing_resources() -> None:
    assert missing_resources([probed(1), probed(2)]) == []
    found = missing_resources([probed(1, slots=9), probed(2, cores=1, gpus=1, shared_memory=2**25)])
    assert [(each.severity, each.what) for each in found] == [
        ("warning", "h1 has 9 slots and 8 cores"),
        ("warning", "h1 has 9 slots and no GPUs"),
        ("warning", "h2 has 4 slots and 1 core"),
        ("warning", "h2 has 4 slots and 1 GPU"),
        ("warning", "h2 has 32 MiB free in /dev/shm, which its ranks need"),
    ]


def test_wrong_names() -> None:
    hosts = [probed(1, own_address="127.0.1.1"), replace(probed(2), address=IPv4Address("192.168.1.2")), probed(3)]
    first, second = wrong_names(hosts, route_of(*hosts))
    assert first.what == "h1 resolves its own name to 127.0.1.1, where no other host finds it"
    assert "give h1 the address 10.0.0.1" in first.remedy
    assert second.what == "h2 resolves to 192.168.1.2, not to 10.0.0.2, its address on 10.0.0.0/24 (eth0)"


def test_one_host_under_two_names() -> None:
    alias = replace(probed(2), entry=Host("10.0.0.2", 1, 3))
    (finding,) = same_host_twice([probed(1), probed(2), alias])
    assert finding == Finding(
        "error",
        "h2 (line 2) and 10.0.0.2 (line 3) are one host, 10.0.0.2",
        "keep one of these lines, with the slots of all",
    )
    localhost = replace(probed(1), entry=Host("localhost", 1, 4), address=IPv4Address("127.0.0.1"))
    (finding,) = same_host_twice([probed(1), localhost])
    assert finding.what == "h1 (line 1) and localhost (line 4) are one host, this machine"


def test_lines_without_slots() -> None:
    without = replace(probed(2), entry=Host("h2", 1, 5, states_slots=False))
    (finding,) = missing_slots([probed(1), without])
    assert finding.what.startswith("line 5 gives h2 no slots")


def test_routes() -> None:
    fast = Interface("ib0", IPv4Interface("10.9.0.1/24"), 100_000)
    docker = Interface("docker0", IPv4Interface("172.17.0.1/16"), 10_000)
    one, two = probed(1), probed(2)
    one.report.interfaces[:0] = [docker, fast]
    two.report.interfaces[:0] = [docker, replace(fast, address=IPv4Interface("10.9.0.2/24"))]
    assert [str(route) for route in possible_routes([one, two])] == ["10.9.0.0/24 (ib0)", "10.0.0.0/24 (eth0)"]
    apart = [probed(1), probed(2)]
    apart[1].report.interfaces[:] = [Interface("ens3", IPv4Interface("10.0.0.2/32"), None)]
    (routed,) = possible_routes(apart)  # by the addresses to which their names resolve
    assert (routed.networks, routed.names, routed.megabits) == (["10.0.0.0/24", "10.0.0.2/32"], ["ens3", "eth0"], None)
    apart[1].report.interfaces[:] = [Interface("ens3", IPv4Interface("10.5.0.2/24"), None)]
    assert possible_routes(apart) == []


HOSTFILE = Path("my hosts.txt")


@pytest.fixture
def programs_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory on the PATH that has all programs; not root, and no other search path than PATH."""
    for program in ("hvdlm", "horovodrun", "mpirun", "prted"):
        (tmp_path / program).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    return tmp_path


def test_commands_for_this_machine(programs_here: Path) -> None:
    assert launch_commands(HOSTFILE, [probed(1)], None) == [
        "horovodrun -np 4 --hostfile 'my hosts.txt' hvdlm train CONFIG",
        "mpirun -np 4 --hostfile 'my hosts.txt' --bind-to none hvdlm train CONFIG",
    ]


def test_commands_outside_of_the_environment(programs_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/env/bin")
    assert launch_commands(Path("hosts"), [probed(1)], None) == [
        "/env/bin/horovodrun -np 4 --hostfile hosts --gloo /env/bin/hvdlm train CONFIG",
        "/env/bin/mpirun -np 4 --hostfile hosts --bind-to none /env/bin/hvdlm train CONFIG",
    ]


def test_commands_where_ssh_sessions_have_the_same_path(programs_here: Path) -> None:
    programs = {name: str(programs_here / name) for name in ("hvdlm", "prted")}
    hosts = [probed(1), probed(2, slots=2, programs=programs)]
    assert launch_commands(Path("hosts"), hosts, route_of(*hosts)) == [
        "horovodrun -np 6 --hostfile hosts --network-interfaces eth0 hvdlm train CONFIG",
        "mpirun -np 6 --hostfile hosts --bind-to none --mca btl_tcp_if_include 10.0.0.0/24 "
        "--prtemca prte_if_include 10.0.0.0/24 hvdlm train CONFIG",
    ]


def test_commands_where_ssh_sessions_have_another_path(programs_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.delenv("OMPI_ALLOW_RUN_AS_ROOT", raising=False)
    hosts = [probed(1), probed(2, programs={"hvdlm": "", "prted": "/usr/bin/prted"})]
    assert launch_commands(Path("hosts"), hosts, route_of(*hosts)) == [
        "horovodrun -np 8 --hostfile hosts --gloo --network-interfaces eth0 hvdlm train CONFIG",
        f"{programs_here}/mpirun -np 8 --hostfile hosts --bind-to none --allow-run-as-root "
        "--mca btl_tcp_if_include 10.0.0.0/24 --prtemca prte_if_include 10.0.0.0/24 -x PATH -x LD_LIBRARY_PATH "
        "hvdlm train CONFIG",
    ]


def test_unusable_launchers_have_no_command(programs_here: Path) -> None:
    neither = {**SOFTWARE, "Horovod": "none", "MPI": "Open MPI 4.1.4"}
    hosts = [probed(1, software=neither), probed(2, software=neither)]
    assert launch_commands(HOSTFILE, hosts, route_of(*hosts)) == []
    hosts = [probed(1), probed(2, interface="ens3")]
    (line,) = launch_commands(HOSTFILE, hosts, route_of(*hosts))
    assert line.startswith(f"{programs_here}/mpirun ")
