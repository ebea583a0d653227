"""`hvdlm doctor --hostfile` on hosts of which one is broken, each time in another way, and on hosts that are sound."""

from __future__ import annotations

import contextlib
import shlex
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jobs
import pytest
from cluster import Cluster
from launcher import BIN, Result

import hvdlm

TIMEOUT = 8  # seconds, of which ssh has half and the probe half
LIBRARY = Path(sysconfig.get_path("purelib"))


# On 4 ranks, 1 + 2 + 3 + 4 = 10.
SUM = [sys.executable, "-c", "from mpi4py.MPI import COMM_WORLD as w; print(w.allreduce(w.rank + 1), flush=True)"]


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster(2, 2)


@pytest.fixture
def hosts(cluster: Cluster) -> Path:
    return cluster.hostfile


def doctor(cluster: Cluster, hostfile: Path, origin: str = "h1") -> Result:
    """Run on `origin`; fails if it leaves a process on any host."""
    command = [str(BIN / "hvdlm"), "doctor", "--hostfile", str(hostfile), "--timeout", str(TIMEOUT)]
    return cluster.run(origin, command, deadline=60)


def errors(result: Result) -> list[str]:
    """What it found wrong; the exit status must say so too."""
    found = [line.removeprefix("error: ") for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.status == int(bool(found)), result.output
    return found


def warnings(result: Result) -> list[str]:
    return [line for line in result.output.splitlines() if line.startswith("warning: ")]


def inside(cluster: Cluster, host: str, line: str) -> None:
    result = cluster.run(host, line)
    assert result.status == 0, result.output


@contextmanager
def covered(cluster: Cluster, host: str, path: str | Path, by: str | Path) -> Iterator[None]:
    """Another file or directory in the place of `path`, in the eyes of one host."""
    inside(cluster, host, shlex.join(["mount", "--bind", str(by), str(path)]))
    try:
        yield
    finally:
        inside(cluster, host, shlex.join(["umount", str(path)]))


@contextmanager
def dead_end(cluster: Cluster, host: str, name: str, address: str) -> Iterator[None]:
    """A network interface that leads nowhere, as docker0 does: an end of a veth pair whose other has no address."""
    lines = [
        f"ip link add {name} type veth peer name {name}-end",
        f"ip link set {name}-end up",
        f"ip address add {address} dev {name}",
        f"ip link set {name} up",
    ]
    inside(cluster, host, " && ".join(lines))
    try:
        yield
    finally:
        inside(cluster, host, f"ip link delete {name}")


def test_a_wrong_key(cluster: Cluster, hosts: Path) -> None:
    with covered(cluster, "h2", "/etc/ssh/authorized_keys", "/dev/null"):
        (error,) = errors(doctor(cluster, hosts))
    assert error.startswith("h2 does not take your ssh key: run `ssh-copy-id h2`")


def test_an_unknown_host_key(cluster: Cluster, hosts: Path) -> None:
    with covered(cluster, "h1", "/etc/ssh/ssh_known_hosts", "/dev/null"):
        (error,) = errors(doctor(cluster, hosts))
    assert error.startswith("the host key of h2 is unknown here: say `ssh h2` once by hand")


def test_a_changed_host_key(cluster: Cluster, hosts: Path, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(f"h2 {(cluster.fabric.state / 'h1' / 'ssh' / 'ssh_host_ed25519_key.pub').read_text()}")
    with covered(cluster, "h1", "/etc/ssh/ssh_known_hosts", known):
        (error,) = errors(doctor(cluster, hosts))
    assert error.startswith("the host key of h2 has changed: ")
    assert "`ssh-keygen -R h2 -f /etc/ssh/ssh_known_hosts`" in error


def test_a_name_that_does_not_resolve(cluster: Cluster, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h1 slots=1\nh2 slots=1\nh7 slots=1\n")
    (error,) = errors(doctor(cluster, hostfile))
    assert error.startswith("the name h7 does not resolve: ")


def test_a_host_that_is_down(cluster: Cluster, hosts: Path) -> None:
    cluster.command("link", "h2", "down")
    try:
        (error,) = errors(doctor(cluster, hosts))
    finally:
        cluster.command("link", "h2", "up")
    assert error.startswith(("h2 does not answer: ", "there is no route to h2: "))


def test_no_sshd(cluster: Cluster, tmp_path: Path) -> None:
    # Nobody listens at the port that ssh is told to take.
    config = tmp_path / "ssh_config"
    config.write_text("Port 2222\n")
    with covered(cluster, "h1", "/etc/ssh/ssh_config", config):
        (error,) = errors(doctor(cluster, cluster.hostfile))
    assert error.startswith("h2 runs no sshd at its ssh port: ")


def test_no_python_at_that_path(cluster: Cluster, hosts: Path, tmp_path: Path) -> None:
    with covered(cluster, "h2", BIN, tmp_path):
        (error,) = errors(doctor(cluster, hosts))
    assert error.startswith(f"there is no Python at {BIN}/python")
    assert " on h2: " in error


def test_python_without_hvdlm(cluster: Cluster, hosts: Path, tmp_path: Path) -> None:
    with covered(cluster, "h2", Path(hvdlm.__file__).parent, tmp_path):
        (error,) = errors(doctor(cluster, hosts))
    assert error.startswith("Python on h2 has no hvdlm")


def test_python_that_hangs(cluster: Cluster, hosts: Path, tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("import time\ntime.sleep(1000)\n")
    with covered(cluster, "h2", Path(hvdlm.__file__).parent, tmp_path):
        (error,) = errors(doctor(cluster, hosts))
    assert error.startswith(f"Python on h2 has not answered within {TIMEOUT} s: ")


def test_versions_that_differ(cluster: Cluster, hosts: Path, tmp_path: Path) -> None:
    other = tmp_path / "version.py"
    other.write_text("__version__ = '1.2.3'\n")
    with covered(cluster, "h2", LIBRARY / "torch" / "version.py", other):
        (error,) = errors(doctor(cluster, hosts))
    assert error.startswith("hosts differ in torch: h1 has ")
    assert ", h2 has 1.2.3: install one version" in error


def test_several_things_wrong_are_all_told(cluster: Cluster, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h1 slots=1\nlocalhost slots=1\nh2\nh8 slots=1\nh9 slots=1\n")
    with covered(cluster, "h2", "/etc/ssh/authorized_keys", "/dev/null"):
        found = errors(doctor(cluster, hostfile))
    assert [next(name for name in ("h2", "h8", "h9", "localhost") if name in error) for error in found] == [
        "h2",
        "h8",
        "h9",
        "localhost",
    ]
    assert found[3].startswith("h1 (line 1) and localhost (line 2) are one host")


def test_a_bad_line(cluster: Cluster, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h1 slots=2\nh2:2\n")
    result = doctor(cluster, hostfile)
    assert result.status == 1
    assert result.output == (
        f"hvdlm: error: {hostfile}, line 2: NAME:SLOTS is for the command line (-H, --host): "
        "write `h2 slots=2`, in 'h2:2'\n"
    )


def test_an_interface_that_only_one_host_has(cluster: Cluster, hosts: Path) -> None:
    with dead_end(cluster, "h1", "docker0", "172.17.0.1/16"):
        result = doctor(cluster, hosts)
    assert errors(result) == []
    assert "every host reaches every other on 10.77.0.0/24 (eth0)\n" in result.output


def test_a_network_that_joins_nobody_though_all_have_it(cluster: Cluster, hosts: Path) -> None:
    # Sorts before 10.77.0.0/24 at the same speed, so that it is the first to be tried.
    with dead_end(cluster, "h1", "san0", "10.1.0.1/24"), dead_end(cluster, "h2", "san0", "10.1.0.2/24"):
        result = doctor(cluster, hosts)
    assert errors(result) == []
    (warning,) = warnings(result)
    assert "on 10.1.0.0/24 (san0), h1 cannot connect to h2 at 10.1.0.2; h2 cannot connect to h1 at 10.1.0.1" in warning
    assert "every host reaches every other on 10.77.0.0/24 (eth0)\n" in result.output


def test_two_networks_that_serve(cluster: Cluster, hosts: Path) -> None:
    with contextlib.ExitStack() as stack:
        for index, host in enumerate(cluster.hosts, start=1):
            second = f"10.78.0.{index}/24 dev eth0"
            stack.enter_context(changed(cluster, host, [f"ip address add {second}"], [f"ip address delete {second}"]))
        result = doctor(cluster, hosts)
    assert errors(result) == []
    (choice,) = [line for line in result.output.splitlines() if line.startswith("network: ")]
    assert choice.startswith("network: every host reaches every other on 10.77.0.0/24 (eth0) at ")
    assert "; so they do on 10.78.0.0/24 (eth0) at " in choice
    assert "--prtemca prte_if_include 10.77.0.0/24 " in printed_lines(result)["mpirun"]


def test_the_machine_that_starts_the_job_is_not_in_the_list(cluster: Cluster, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h2 slots=2\n")
    result = doctor(cluster, hostfile)
    assert errors(result) == []
    assert "every host reaches every other on 10.77.0.0/24 (eth0)\n" in result.output
    assert printed_lines(result)["horovodrun"].startswith("horovodrun -np 2 ")


def test_a_host_whose_name_misleads(cluster: Cluster, hosts: Path, tmp_path: Path) -> None:
    names = tmp_path / "etc-hosts"
    names.write_text("127.0.0.1 localhost\n127.0.1.1 h2\n10.77.0.1 h1\n")
    with covered(cluster, "h2", "/etc/hosts", names):
        result = doctor(cluster, hosts)
    assert errors(result) == []
    (warning,) = warnings(result)
    assert warning.startswith("warning: h2 resolves its own name to 127.0.1.1")


def test_no_common_network(cluster: Cluster, hosts: Path) -> None:
    # h2 has its address on the loopback, where no job can use it, and a route by which ssh comes through all the same.
    away = [
        "ip address add 10.77.0.2/32 dev lo",
        "ip address add 10.78.0.2/24 dev eth0",
        "ip address delete 10.77.0.2/24 dev eth0",
        "ip route add 10.77.0.0/24 dev eth0 src 10.77.0.2",
    ]
    back = [
        "ip address delete 10.78.0.2/24 dev eth0",
        "ip address add 10.77.0.2/24 dev eth0",
        "ip address delete 10.77.0.2/32 dev lo",
    ]
    with changed(cluster, "h2", away, back):
        (error,) = errors(doctor(cluster, hosts))
    assert error.startswith("no network joins all hosts: h1 has 10.77.0.1/24 (eth0); h2 has 10.78.0.2/24 (eth0): ")


def test_a_network_that_is_routed(cluster: Cluster, hosts: Path) -> None:
    # As clouds do it: each host has a network of its own, of one address.
    with contextlib.ExitStack() as stack:
        for index, host in enumerate(cluster.hosts, start=1):
            wide, single = f"10.77.0.{index}/24 dev eth0", f"10.77.0.{index}/32 dev eth0"
            away = [f"ip address add {single}", f"ip address delete {wide}", "ip route add 10.77.0.0/24 dev eth0"]
            back = [f"ip address delete {single}", f"ip address add {wide}"]
            stack.enter_context(changed(cluster, host, away, back))
        result = doctor(cluster, hosts)
    assert errors(result) == []
    assert "every host reaches every other on 10.77.0.1/32, 10.77.0.2/32 (eth0)\n" in result.output
    lines = printed_lines(result)
    assert " --network-interfaces eth0 " in lines["horovodrun"]
    assert " --mca btl_tcp_if_include eth0 --prtemca prte_if_include eth0 " in lines["mpirun"]


def test_interfaces_of_other_names(cluster: Cluster, hosts: Path) -> None:
    def rename(old: str, new: str) -> list[str]:
        return [f"ip link set {old} down", f"ip link set {old} name {new}", f"ip link set {new} up"]

    with changed(cluster, "h2", rename("eth0", "ens3"), rename("ens3", "eth0")):
        result = doctor(cluster, hosts)
        assert errors(result) == []
        (warning,) = warnings(result)
        assert "(ens3, eth0), and horovodrun takes one name for all hosts" in warning
        lines = printed_lines(result)
        assert list(lines) == ["mpirun"]
        ranks = cluster.run("h1", lines["mpirun"].replace("hvdlm train CONFIG", shlex.join(SUM)), deadline=60)
    assert sorted(ranks.output.split()) == ["10"] * 4, ranks.output


@contextmanager
def changed(cluster: Cluster, host: str, away: Sequence[str], back: Sequence[str]) -> Iterator[None]:
    """A host as commands make it, until others undo them."""
    inside(cluster, host, " && ".join(away))
    try:
        yield
    finally:
        inside(cluster, host, " && ".join(back))


def printed_lines(result: Result) -> dict[str, str]:
    """The lines to paste, by launcher."""
    lines = [line.strip() for line in result.output.splitlines() if line.endswith(" hvdlm train CONFIG")]
    return {Path(line.split()[0]).name: line for line in lines}


def test_the_printed_lines_train(cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# a rank a host\nh1 slots=1\n\nh2 slots=1\n")
    curves = {}
    with dead_end(cluster, "h1", "docker0", "172.17.0.1/16"), dead_end(cluster, "h2", "docker0", "172.17.0.1/16"):
        result = doctor(cluster, hosts)
        assert errors(result) == []
        assert warnings(result) == []
        lines = printed_lines(result)
        assert sorted(lines) == ["horovodrun", "mpirun"], result.output
        for launcher, line in lines.items():
            train = jobs.command(small_data, tmp_path / launcher, train__steps=2, optimizer__warmup_steps=1)
            pasted = line.replace("CONFIG", shlex.join(train[2:]))
            run = cluster.run("h1", pasted, deadline=120)
            assert run.status == 0, run.output
            curves[launcher] = jobs.losses(tmp_path / launcher)
            assert {record["world_size"] for record in jobs.records(tmp_path / launcher)} == {2}
    jobs.assert_same_curve(curves["mpirun"], curves["horovodrun"], 1e-4)
    assert list(curves["mpirun"]) == [1, 2]


@pytest.mark.parametrize("launcher", ["horovodrun --gloo", "mpirun --bind-to none"])
def test_more_ranks_than_slots(cluster: Cluster, hosts: Path, launcher: str) -> None:
    words: Sequence[str] = [*launcher.split(), "-np", "5", "--hostfile", str(hosts), "hostname"]
    result = cluster.run("h1", words, deadline=30)
    assert result.status != 0
    assert "slots" in result.output
