"""`hvdlm doctor --hostfile` on hosts of which one is broken, each time in another way, and on hosts that are sound."""

from __future__ import annotations

import contextlib
import re
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

pytestmark = pytest.mark.needs_root

TIMEOUT = 20  # seconds, of which ssh has half and the probe half
LIBRARY = Path(sysconfig.get_path("purelib"))
PACKAGE = Path(hvdlm.__file__).parent

# On 4 ranks, 1 + 2 + 3 + 4 = 10.
SUM = [sys.executable, "-c", "from mpi4py.MPI import COMM_WORLD as w; print(w.allreduce(w.rank + 1), flush=True)"]


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    """A host for each fault, and the one where doctor runs."""
    return start_cluster(1 + len(FAULTS), 2)


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """A list of the first two."""
    hostfile = tmp_path / "two-hosts"
    hostfile.write_text("h1 slots=2\nh2 slots=2\n")
    return hostfile


def doctor(cluster: Cluster, hostfile: Path, timeout: float = TIMEOUT) -> Result:
    """Run on h1; fails if it leaves a process on any host."""
    command = [str(BIN / "hvdlm"), "doctor", "--hostfile", str(hostfile), "--timeout", str(timeout)]
    return cluster.run("h1", command, deadline=100)


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
def changed(cluster: Cluster, host: str, away: Sequence[str], back: Sequence[str]) -> Iterator[None]:
    """A host as commands make it, until others undo them."""
    inside(cluster, host, " && ".join(away))
    try:
        yield
    finally:
        inside(cluster, host, " && ".join(back))


@contextmanager
def dead_end(cluster: Cluster, host: str, name: str, address: str) -> Iterator[None]:
    """A network interface that leads nowhere, as docker0 does: an end of a veth pair whose other has no address."""
    away = [
        f"ip link add {name} type veth peer name {name}-end",
        f"ip link set {name}-end up",
        f"ip address add {address} dev {name}",
        f"ip link set {name} up",
    ]
    with changed(cluster, host, away, [f"ip link delete {name}"]):
        yield


@contextmanager
def cut(cluster: Cluster, host: str) -> Iterator[None]:
    assert cluster.command("link", host, "down").status == 0
    try:
        yield
    finally:
        assert cluster.command("link", host, "up").status == 0


# What is wrong, and what doctor says of it; {host} is the one that has it.
PATIENCE = 12  # seconds for hosts that do not answer
FAULTS = {
    "wrong key": "{host} does not take your ssh key: run `ssh-copy-id {host}`",
    "unknown host key": "the host key of {host} is unknown here: say `ssh {host}` once by hand",
    "changed host key": "the host key of {host} has changed: .*`ssh-keygen -R {host} -f /etc/ssh/ssh_known_hosts`",
    "cut link": "({host} does not answer: |there is no route to {host}: )",
    "no sshd": "{host} runs no sshd at its ssh port: ",
    "no Python": f"there is no Python at {re.escape(str(BIN))}/python.* on {{host}}: ",
    "no hvdlm": "Python on {host} has no hvdlm",
    "Python that hangs": f"Python on {{host}} has not answered within {PATIENCE} s: ",
    "another torch": "hosts differ in torch: h1 has .*, {host} has 1.2.3: install one version",
}
HOST_OF = {fault: f"h{number}" for number, fault in enumerate(FAULTS, start=2)}
NO_NAME = "h77"


@pytest.fixture(scope="module")
def found(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The errors of one doctor for hosts of which each has its fault, and for a name that does not resolve."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "empty").mkdir()
    (folder / "hangs").mkdir()
    (folder / "hangs" / "__init__.py").write_text("import time\ntime.sleep(1000)\n")
    (folder / "version.py").write_text("__version__ = '1.2.3'\n")
    # Nobody listens at the port that ssh is told to take
    own = (cluster.fabric.state / "h1" / "ssh" / "ssh_config").read_text()
    (folder / "ssh_config").write_text(f"Host {HOST_OF['no sshd']}\n    Port 2222\n{own}")
    key = (cluster.fabric.state / "h1" / "ssh" / "ssh_host_ed25519_key.pub").read_text()
    known = (cluster.fabric.state / "h1" / "ssh" / "ssh_known_hosts").read_text().splitlines(keepends=True)
    odd = tuple(f"{HOST_OF[fault]}," for fault in ("unknown host key", "changed host key"))
    left = [line for line in known if not line.startswith(odd)]
    assert len(left) == len(known) - 2
    (folder / "known_hosts").write_text("".join(left) + f"{HOST_OF['changed host key']} {key}")
    names = ["h1", *HOST_OF.values(), NO_NAME]
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in names))
    with contextlib.ExitStack() as stack:
        for host, path, by in (
            ("h1", "/etc/ssh/ssh_known_hosts", folder / "known_hosts"),
            ("h1", "/etc/ssh/ssh_config", folder / "ssh_config"),
            (HOST_OF["wrong key"], "/etc/ssh/authorized_keys", "/dev/null"),
            (HOST_OF["no Python"], BIN, folder / "empty"),
            (HOST_OF["no hvdlm"], PACKAGE, folder / "empty"),
            (HOST_OF["Python that hangs"], PACKAGE, folder / "hangs"),
            (HOST_OF["another torch"], LIBRARY / "torch" / "version.py", folder / "version.py"),
        ):
            stack.enter_context(covered(cluster, host, path, by))
        stack.enter_context(cut(cluster, HOST_OF["cut link"]))
        return errors(doctor(cluster, folder / "hosts", PATIENCE))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_its_host_and_remedy(fault: str, found: list[str]) -> None:
    sentence = re.compile(FAULTS[fault].format(host=HOST_OF[fault]))
    assert len([error for error in found if sentence.match(error)]) == 1, found
    # and nothing else of that host
    assert len([error for error in found if re.search(rf"\b{HOST_OF[fault]}\b", error)]) == 1, found


def test_a_name_that_does_not_resolve(found: list[str]) -> None:
    assert len([error for error in found if error.startswith(f"the name {NO_NAME} does not resolve: ")]) == 1, found
    assert len(found) == len(FAULTS) + 1


def test_several_things_wrong_are_all_told(cluster: Cluster, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h1 slots=1\nlocalhost slots=1\nh2\nh88 slots=1\nh99 slots=1\n")
    with covered(cluster, "h2", "/etc/ssh/authorized_keys", "/dev/null"):
        found = errors(doctor(cluster, hostfile))
    assert [next(name for name in ("h2", "h88", "h99", "localhost") if name in error) for error in found] == [
        "h2",
        "h88",
        "h99",
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


def test_networks_that_do_not_join_the_hosts_and_a_name_that_misleads(
    cluster: Cluster, hosts: Path, tmp_path: Path
) -> None:
    """An interface that only one host has, one that all have and that joins nobody, and a name of the loopback."""
    names = tmp_path / "etc-hosts"
    names.write_text("127.0.0.1 localhost\n127.0.1.1 h2\n10.77.0.1 h1\n")
    with contextlib.ExitStack() as stack:
        stack.enter_context(dead_end(cluster, "h1", "docker0", "172.17.0.1/16"))
        # Sorts before 10.77.0.0/24 at the same speed, so that it is the first to be tried
        for index, host in enumerate(("h1", "h2"), start=1):
            stack.enter_context(dead_end(cluster, host, "san0", f"10.1.0.{index}/24"))
        stack.enter_context(covered(cluster, "h2", "/etc/hosts", names))
        result = doctor(cluster, hosts, PATIENCE)
    assert errors(result) == []
    nobody, misleading = sorted(warnings(result), key=lambda warning: "san0" not in warning)
    assert "on 10.1.0.0/24 (san0), h1 cannot connect to h2 at 10.1.0.2; h2 cannot connect to h1 at 10.1.0.1" in nobody
    assert misleading.startswith("warning: h2 resolves its own name to 127.0.1.1")
    assert "every host reaches every other on 10.77.0.0/24 (eth0)\n" in result.output


def test_two_networks_that_serve(cluster: Cluster, hosts: Path) -> None:
    with contextlib.ExitStack() as stack:
        for index, host in enumerate(("h1", "h2"), start=1):
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
        for index, host in enumerate(("h1", "h2"), start=1):
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
    result = cluster.run("h1", words, deadline=60)
    assert result.status != 0
    assert "slots" in result.output
