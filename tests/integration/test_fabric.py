"""The cluster in a box: hosts with networks and names of their own, real sshd, shaped links, and a clean end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cluster import Cluster
from launcher import BIN, run, start
from thorough import thorough
from waiting import wait_for

from hvdlm.cluster.fabric.fabric import Fabric

# Sends as much as it is told to, and prints how long that took until the other side had it all.
SENDER = """
import socket, sys, time
host, megabytes = sys.argv[1], int(sys.argv[2])
with socket.create_connection((host, 7777), timeout=10) as connection:
    start = time.perf_counter()
    connection.sendall(bytes(megabytes * 1_000_000))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
    print(megabytes * 8 / (time.perf_counter() - start))
"""
RECEIVER = """
import socket
with socket.create_server(("", 7777)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    while connection.recv(1 << 20):
        pass
    connection.sendall(b".")
"""


DYING_UP = Path(__file__).with_name("dying_up.py")


@pytest.fixture(scope="module")
def own_ssh() -> Iterator[Path]:
    """The directory of the user's own ssh keys, which is there; the one made for this must be left empty."""
    directory = Path.home() / ".ssh"
    is_new = not directory.exists()
    directory.mkdir(mode=0o700, exist_ok=True)
    yield directory
    if is_new:
        directory.rmdir()


@pytest.fixture(scope="module")
def cluster(own_ssh: Path, start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster(3, 2, "--rate", "100mbit")


@pytest.mark.needs_root
def test_each_host_has_a_name_an_address_and_processes_of_its_own(cluster: Cluster) -> None:
    facts = "hostname; ip -brief address show eth0; ls /proc | grep -c '^[0-9]'; df --output=fstype /run /dev/shm"
    for index, host in enumerate(cluster.hosts, start=1):
        name, interface, processes, *systems = cluster.run(host, facts).output.splitlines()
        assert name == host
        assert f"10.77.0.{index}/24" in interface
        assert int(processes) < 10  # its own few, none of the machine's
        assert systems == ["Type", "tmpfs", "tmpfs"]


@pytest.mark.needs_root
def test_ssh_reaches_every_host_from_every_host_without_a_question(cluster: Cluster) -> None:
    for origin in cluster.hosts:
        for target in cluster.hosts:
            result = cluster.run(origin, ["ssh", "-o", "BatchMode=yes", target, "hostname"], deadline=60)
            assert (result.status, result.output) == (0, f"{target}\n")


@pytest.mark.needs_root
def test_nothing_of_the_machine_is_touched(cluster: Cluster, own_ssh: Path) -> None:
    assert not {name for name in psutil.net_if_addrs() if name in ("switch", *cluster.hosts)}
    before = {path.name: path.read_bytes() for path in own_ssh.iterdir()}
    result = cluster.run("h1", f"ssh -o StrictHostKeyChecking=no 10.77.0.2 true && touch {own_ssh}/made-in-a-host")
    assert result.status == 0, result.output
    assert (cluster.fabric.state / "h1" / "home-ssh" / "made-in-a-host").exists()
    assert {path.name: path.read_bytes() for path in own_ssh.iterdir()} == before
    assert os.uname().nodename not in cluster.hosts


def bandwidth(cluster: Cluster, megabytes: int) -> float:
    """Mbit/s of one TCP connection from h1 to h2."""
    words = [str(BIN / "hvdlm"), "fabric", "--state", str(cluster.fabric.state), "run", "h2", "--"]
    with start([*words, sys.executable, "-c", RECEIVER]) as receiver:
        assert receiver.process.stdout is not None
        assert receiver.process.stdout.readline() == "listening\n"
        sent = run([*words[:-2], "h1", "--", sys.executable, "-c", SENDER, "h2", str(megabytes)], deadline=60)
        receiver.finish(deadline=60)
    assert sent.status == 0, sent.output
    return float(sent.output)


@pytest.mark.needs_root
@pytest.mark.timing
def test_a_link_has_the_rate_it_was_given_while_it_is_used(cluster: Cluster) -> None:
    # 64 KiB of headers and a burst of 256 KiB at the start are not counted by the clock of a shaped link
    assert 80 < bandwidth(cluster, 12) < 105
    assert cluster.command("link", "h2", "20mbit").status == 0
    assert 15 < bandwidth(cluster, 4) < 23
    assert cluster.command("link", "h2", "100mbit").status == 0
    assert "100mbit" in cluster.command("status").output


@pytest.mark.needs_root
def test_a_link_can_be_cut_and_healed(cluster: Cluster) -> None:
    for seconds in (2, 4):  # h1 still asks for h2's address, or has given up, which takes 3 s
        ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={seconds}", "h2", "hostname"]
        assert cluster.command("link", "h2", "down").status == 0
        assert "down" in cluster.command("status").output
        assert cluster.run("h1", ssh).status == 255
        assert cluster.command("link", "h2", "up").status == 0
        assert cluster.run("h1", ssh).output == "h2\n"


@pytest.mark.needs_root
def test_exit_status_directory_environment_and_signals_pass_through(cluster: Cluster, tmp_path: Path) -> None:
    result = cluster.run("h3", "pwd; echo $COLOUR; exit 7", extra={"COLOUR": "blue"}, cwd=tmp_path)
    assert (result.status, result.output) == (7, f"{tmp_path}\nblue\n")
    program = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); print(1, flush=True)"
    words = [str(BIN / "hvdlm"), "fabric", "--state", str(cluster.fabric.state), "run", "h3", "--"]
    with start([*words, sys.executable, "-c", f"{program}; signal.pause()"]) as job:
        assert job.process.stdout is not None
        job.process.stdout.readline()
        job.process.send_signal(signal.SIGTERM)
        assert job.finish(deadline=60).status == 9
    assert cluster.end_jobs() == []


def names_on(cluster: Cluster, host: str) -> set[str]:
    """Of the programs that run on a host of the cluster."""
    return {process.name() for process in cluster.fabric.jobs(host)}


@pytest.mark.needs_root
def test_status_counts_what_runs(cluster: Cluster) -> None:
    words = [
        "fabric",
        "--state",
        str(cluster.fabric.state),
        "run",
        "h2",
        "--",
        "bash",
        "-c",
        "sleep 60 & echo on; wait",
    ]
    with start([str(BIN / "hvdlm"), *words]) as job:
        assert job.process.stdout is not None
        job.process.stdout.readline()
        # A process that bash has made for a program has bash's name until it becomes that program
        wait_for(lambda: names_on(cluster, "h2") == {"bash", "sleep"}, 20, "bash and its sleep on h2")
        assert cluster.fabric.jobs("h1") == []
    assert cluster.end_jobs() == []


@pytest.fixture
def fabric(tmp_path: Path) -> Iterator[Fabric]:
    """One that may be started, and is down after the test in any case."""
    fabric = Fabric(tmp_path / "state")
    yield fabric
    fabric.down()


@pytest.mark.needs_root
def test_down_ends_what_it_started_also_after_a_crash(fabric: Fabric) -> None:
    cluster = Cluster.start(fabric.state, 2, 1)
    bystander = subprocess.Popen(["sleep", "60"])
    words = [str(BIN / "hvdlm"), "fabric", "--state", str(cluster.fabric.state)]
    # a job that has left its session and its parents, as daemons do
    subprocess.run([*words, "run", "h1", "--", "bash", "-c", "for i in 1 2; do setsid sleep 600 >/dev/null & done"])
    sleepers = [*cluster.fabric.jobs("h1")]
    assert len(sleepers) == 2
    first = psutil.Process(sleepers[0].ppid())
    ends_like = [str(cluster.fabric.state), "h2"]
    dying = [each for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or [])[-2:] == ends_like]
    assert dying
    for process in dying:
        process.kill()  # a host dies
    assert first.is_running()
    cluster.down()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in [first, *sleepers])
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    cluster.down()  # a second time there is nothing to do


def daemons(fabric: Fabric, host: str) -> set[str]:
    """The names of what a host's process 1 has started."""
    return {child.name() for child in psutil.Process(fabric._host(host)).children()}


# What there is of a fabric when `up` is killed at a stage of dying_up.py
STAGES: dict[str, Callable[[Fabric], bool]] = {
    "the state directory is made": lambda fabric: fabric.state.is_dir() and not any(fabric.state.iterdir()),
    "the host list is written": lambda fabric: fabric._is_fabric() and not fabric._processes(),
    "the switch is started": lambda fabric: bool(fabric._processes()) and not fabric._hosts(),
    "a host is started": lambda fabric: bool(fabric._find("host")) and "h2" not in fabric._hosts(),
    "sshd runs": lambda fabric: daemons(fabric, "h1") == {"sshd"},
}


@pytest.mark.needs_root
@pytest.mark.parametrize("stage", [*map(thorough, list(STAGES)[:-1]), list(STAGES)[-1]])
def test_down_after_up_was_killed(stage: str, fabric: Fabric) -> None:
    command = [sys.executable, str(DYING_UP), stage, "fabric", "--state", str(fabric.state), "up", "--hosts", "3"]
    up = subprocess.run(command, timeout=60)
    assert up.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not STAGES[stage](fabric):  # what it started goes on by itself for a while
        assert time.monotonic() < deadline, f"stage {stage!r} was not reached"
        time.sleep(0.01)
    assert run([str(BIN / "hvdlm"), "fabric", "--state", str(fabric.state), "down"]).status == 0
    named = [each.info["cmdline"] or [] for each in psutil.process_iter(["cmdline"])]
    assert not [words for words in named if str(fabric.state) in words]
    Cluster.start(fabric.state, 1, 1).down()


@pytest.mark.needs_root
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["up", "--hosts", "0"], "1 to 64 hosts"),
        (["up", "--hosts", "2", "--rate", "fast"], "'fast' is not a link's rate"),
        (["run", "h1", "--", "true"], "no fabric is up in"),
        (["link", "h1", "down"], "no fabric is up in"),
    ],
)
def test_wrong_words(tmp_path: Path, words: list[str], sentence: str) -> None:
    result = run([str(BIN / "hvdlm"), "fabric", "--state", str(tmp_path / "state"), *words])
    assert result.status == 1
    assert sentence in result.output
    assert not (tmp_path / "state").exists()


@pytest.mark.needs_root
def test_wrong_words_for_a_fabric_that_is_up(cluster: Cluster) -> None:
    assert "has no host h9, only h1, h2, h3" in cluster.command("run", "h9", "--", "true").output
    assert "not a link's rate" in cluster.command("link", "h1", "sideways").output
    again = cluster.command("up", "--hosts", "2")
    assert again.status == 1
    assert "a fabric is up in" in again.output
    assert Fabric(cluster.fabric.state).jobs("h1") == []


WITHOUT = {
    "programs": ("import sys; from hvdlm.cluster.fabric import programs; programs._DIRECTORIES = sys.argv.pop(1)"),
    # imported while its files can still be read
    "root": (
        "import os, sys, hvdlm.cluster.fabric.fabric, hvdlm.cli; sys.argv.pop(1); "
        "os.geteuid() == 0 and os.setuid(65534)"
    ),
}


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        pytest.param(
            "programs",
            "apt-get install iproute2 openssh-client openssh-server slurm-wlm util-linux",
            marks=pytest.mark.needs_root,
        ),
        ("root", "only root may"),
    ],
)
def test_what_is_missing_is_named(missing: str, sentence: str, tmp_path: Path) -> None:
    """One sentence that says what to do or to install."""
    code = f"{WITHOUT[missing]}; from hvdlm.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["fabric", "--state", str(tmp_path / "state"), "up", "--hosts", "2", "--slurm"]
    result = run([sys.executable, "-c", code, str(tmp_path), *words])
    assert result.status == 1
    assert sentence in result.output
