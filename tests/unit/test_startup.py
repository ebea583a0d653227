"""What Open MPI is kept off, and how a rank ends that reaches nobody while a library does not return."""

from __future__ import annotations

import signal
import subprocess
import sys
from ipaddress import IPv4Interface

import pytest

from hvdlm.comm import startup as subject
from hvdlm.comm.interfaces import Interface
from hvdlm.comm.startup import exclude_guest_bridges, is_guest_bridge, startup_deadline

ETHERNET = Interface("eth0", IPv4Interface("10.0.0.1/24"), 1000)
FABRIC = Interface("ib0", IPv4Interface("10.1.0.1/24"), 100_000)
DOCKER = Interface("docker0", IPv4Interface("172.17.0.1/16"), None)

# A rank whose first message hangs inside a library that never looks at Python: here a sleep of the C library's, which
# goes on after a signal.
HANGS = """
import ctypes, logging, sys
from hvdlm.comm.startup import startup_deadline
logging.basicConfig()
libc = ctypes.CDLL(None)
with startup_deadline(rank=3, seconds=float(sys.argv[1])):
    print("waiting", flush=True)
    while libc.sleep(30):
        pass
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("docker0", True),
        ("br-0123456789ab", True),
        ("virbr0", True),
        ("cni0", True),
        ("eth0", False),
        ("br0", False),  # a bridge that somebody made by hand may well lead to other hosts
        ("docker-net", False),
        ("ib0", False),
    ],
)
def test_bridges_for_guests_are_known_by_name(name: str, expected: bool) -> None:
    assert is_guest_bridge(Interface(name, IPv4Interface("172.17.0.1/16"), None)) is expected


def test_open_mpi_is_kept_off_bridges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "own_interfaces", lambda: [DOCKER, ETHERNET])
    monkeypatch.setattr(subject, "_open_mpi_uses_defaults", lambda: True)
    environment: dict[str, str] = {}
    exclude_guest_bridges(environment)
    assert environment == {"OMPI_MCA_btl_tcp_if_exclude": "127.0.0.1/8,sppp,docker0"}


@pytest.mark.parametrize("name", ["OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"])
def test_what_the_user_told_open_mpi_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "own_interfaces", lambda: [DOCKER, ETHERNET])
    environment = {name: "docker0"}
    exclude_guest_bridges(environment)
    assert environment == {name: "docker0"}


def test_without_bridges_open_mpi_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "own_interfaces", lambda: [ETHERNET, FABRIC])
    environment: dict[str, str] = {}
    exclude_guest_bridges(environment)
    assert environment == {}


def test_several_networks_are_named_with_the_flags() -> None:
    sentence = subject._failure_message(2, "has not reached the others within 60 s", [DOCKER, ETHERNET, FABRIC])
    assert sentence.startswith("rank 2 on ")
    assert "on 10.0.0.0/24 (eth0) and 10.1.0.0/24 (ib0), and one of these" in sentence
    assert "mpirun --mca btl_tcp_if_include 10.0.0.0/24 or 10.1.0.0/24" in sentence
    assert "horovodrun --network-interfaces eth0 or ib0" in sentence
    assert "docker0" not in sentence


def test_with_one_network_the_hosts_are_to_blame() -> None:
    sentence = subject._failure_message(2, "has not reached the others within 60 s", [DOCKER, ETHERNET])
    assert "firewall" in sentence and "`hvdlm doctor --hostfile FILE`" in sentence


def test_it_leaves_signals_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with startup_deadline(rank=0, seconds=30):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_an_error_inside_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="from the library"), startup_deadline(rank=0, seconds=30):
        raise RuntimeError("from the library")


def test_a_rank_that_hangs_ends() -> None:
    result = subprocess.run([sys.executable, "-c", HANGS, "0.5"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "rank 3 on" in result.stderr and "has not reached the others within 0.5 s" in result.stderr


def test_a_rank_that_is_ended_says_so() -> None:
    """Open MPI aborts one rank, mpirun ends the others: these know the remedy."""
    with subprocess.Popen(
        [sys.executable, "-c", HANGS, "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == "waiting\n"
        rank.send_signal(signal.SIGTERM)
        _, said = rank.communicate(timeout=60)
    assert rank.returncode == 128 + signal.SIGTERM
    assert "rank 3 on" in said and "was ended before it had reached the others" in said
