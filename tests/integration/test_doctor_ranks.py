"""Ranks on two emulated hosts with networks of their own: what doctor says of them, and networks that lead nowhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from cluster import Cluster
from launcher import Result

# An interface that is up, with a carrier, and leads to nobody; docker0 is a bridge with a container on it.
DOCKER = (
    "ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0 && ip link add port type veth peer guest "
    "&& ip link set port master docker0 && ip link set port up && ip link set guest up && ip link set docker0 up"
)
NOWHERE = (
    "ip link add ib0 type veth peer nowhere && ip addr add 192.168.50.7/24 dev ib0 && "
    "ip link set nowhere up && ip link set ib0 up"
)
UNDO = "for each in docker0 port ib0; do ! ip link show $each || ip link delete $each; done"

GLOO = "horovodrun --gloo"

pytestmark = pytest.mark.needs_root


def doctor(cluster: Cluster, launcher: str, ranks: int, *words: str, **extra: str) -> Result:
    options = {
        "mpirun": ["--hostfile", str(cluster.hostfile), "--map-by", "node", "-x", "PATH", "--bind-to", "none"],
        GLOO: ["-H", f"h1:{ranks // 2},h2:{ranks // 2}"],
    }[launcher]
    return cluster.run("h1", [*launcher.split(), "-np", str(ranks), *options, "hvdlm", "doctor", *words], extra=extra)


def on_both(cluster: Cluster, line: str) -> None:
    for host in cluster.hosts:
        result = cluster.run(host, line)
        assert result.status == 0, result.output


@pytest.fixture
def interface(cluster: Cluster) -> Iterator[Callable[[str], None]]:
    """`interface(line)` makes one more on both hosts, until the test has ended."""
    yield lambda line: on_both(cluster, line)
    on_both(cluster, UNDO)


def megabits(result: Result, place: str) -> float:
    """Of the row of speeds that begins with `place`."""
    found = re.search(rf"│ {place}[^\n]*?([\d.]+) Mbit/s", result.output)
    assert found, result.output
    return float(found.group(1))


def assert_sound(result: Result) -> None:
    """Four ranks on two hosts, which talk by eth0."""
    assert result.status == 0, result.output
    assert "4 ranks on 2 nodes" in result.output
    assert "nothing was found wrong" in result.output
    for host in (1, 2):
        assert len(re.findall(rf"│ h{host} .*│ eth0 10\.77\.0\.{host}/24", result.output)) == 2, result.output
    assert megabits(result, "between nodes, ranks 0 and") > 0


@pytest.mark.timing
def test_mpi_beside_docker_and_a_slow_link_shows(cluster: Cluster, interface: Callable[[str], None]) -> None:
    """docker0 has one address on both hosts: Open MPI by itself would hang there."""
    interface(DOCKER)
    cluster.fabric.link("h2", "10mbit")
    result = doctor(cluster, "mpirun", 4)
    assert_sound(result)
    assert 5 < megabits(result, "between nodes") < 11
    assert megabits(result, "within a node") > 500
    assert megabits(result, "all 4 ranks") < 22  # two neighbours of a ring, or a tree, share the link


def test_horovod_beside_docker_and_a_network_that_leads_nowhere(
    cluster: Cluster, interface: Callable[[str], None]
) -> None:
    interface(DOCKER)
    interface(NOWHERE)
    result = doctor(cluster, GLOO, 4, "--engine", "horovod")
    assert_sound(result)
    assert "started by horovodrun, engine horovod" in result.output


def test_gloo_passes_over_a_network_that_leads_nowhere(cluster: Cluster, interface: Callable[[str], None]) -> None:
    interface(NOWHERE)
    result = doctor(cluster, GLOO, 2, "--engine", "torch")
    assert result.status == 0, result.output
    assert "2 ranks on 2 nodes, started by horovodrun, engine torch" in result.output


@pytest.mark.parametrize("engine", ["mpi", "torch"])
def test_a_network_that_leads_nowhere_ends_mpi_with_a_sentence(
    engine: str, cluster: Cluster, interface: Callable[[str], None]
) -> None:
    """Open MPI takes it for a way to the other host: it hangs or aborts, and a rank says what to do."""
    interface(NOWHERE)
    result = doctor(cluster, "mpirun", 2, "--engine", engine, "--timeout", "3")
    assert result.status != 0, result.output
    said = [line for line in result.output.splitlines() if "hvdlm: error: " in line]
    assert said, result.output
    assert re.search(r"rank \d on h[12] (has not reached the others|was ended before it had reached)", said[0])
    assert "10.77.0.0/24 (eth0) and 192.168.50.0/24 (ib0)" in said[0]
    assert "mpirun --mca btl_tcp_if_include 10.77.0.0/24" in said[0]


def test_the_remedy_helps(cluster: Cluster, interface: Callable[[str], None]) -> None:
    interface(NOWHERE)
    result = doctor(cluster, "mpirun", 2, OMPI_MCA_btl_tcp_if_include="10.77.0.0/24")
    assert result.status == 0, result.output
    assert "nothing was found wrong" in result.output


def test_a_variable_that_names_no_interface(cluster: Cluster) -> None:
    result = doctor(cluster, GLOO, 2, "--engine", "torch", "--timeout", "5", GLOO_SOCKET_IFNAME="docker7")
    assert result.status != 0, result.output
    assert "GLOO_SOCKET_IFNAME=docker7 names no interface of h1, which has eth0 (10.77.0.1/24)" in result.output
