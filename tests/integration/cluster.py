"""An emulated cluster for tests: `hvdlm fabric`, programs run in its hosts, and nothing left behind on any of them."""

from __future__ import annotations

import json
import shlex
import subprocess
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from launcher import BIN, Result, environment, run

from hvdlm.cluster.fabric import network, programs
from hvdlm.cluster.fabric.fabric import Fabric
from hvdlm.comm.rate import parse_rate
from hvdlm.errors import HvdlmError

RATE = "10gbit"  # of the shared cluster's links, between tests


class Cluster:
    """A fabric that is up."""

    def __init__(self, state: Path, hosts: int) -> None:
        """`state`: of a fabric that is up. `start` makes one."""
        self.fabric = Fabric(state)
        self.hosts = [f"h{index}" for index in range(1, hosts + 1)]
        self.hostfile = state / "hostfile"

    @classmethod
    def start(cls, state: Path, hosts: int, slots: int, *options: str) -> Cluster:
        """`options`: more words for `hvdlm fabric up`."""
        cluster = cls(state, hosts)
        result = cluster.command("up", "--hosts", str(hosts), "--slots", str(slots), *options)
        assert result.status == 0, result.output
        return cluster

    def words(self, *words: str) -> list[str]:
        """`hvdlm fabric` with this fabric's state."""
        return [str(BIN / "hvdlm"), "fabric", "--state", str(self.fabric.state), *words]

    def inside(self, host: str, command: Sequence[str]) -> list[str]:
        """What runs a command in a host."""
        return self.words("run", host, "--", *command)

    def command(self, *words: str, deadline: float = 60) -> Result:
        return run(self.words(*words), deadline)

    def set_links(self, change: str) -> None:
        """Gives every host's link a rate, or cuts or heals it."""
        for host in self.hosts:
            self.fabric.link(host, change)

    def run(
        self,
        host: str,
        command: Sequence[str] | str,
        deadline: float = 120,
        extra: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        may_go_on: bool = False,
    ) -> Result:
        """Runs words, or a line as a shell takes it, in a host.

        Fails if processes are left on any host afterwards, unless it has started what `may_go_on`.
        """
        words = ["bash", "-c", command] if isinstance(command, str) else list(map(str, command))
        inside = self.inside(host, words)
        if may_go_on:  # without the mark by which `launcher.run` finds what a command has left behind
            done = subprocess.run(
                inside,
                env=environment(extra),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=deadline,
            )
            return Result(done.returncode, done.stdout)
        try:
            result = run(inside, deadline, extra, cwd)
        finally:
            left = self.end_jobs()
        assert not left, f"{shlex.join(words)} left processes behind: {left}\n{result.output}"
        return result

    def end_jobs(self, patience: float = 10) -> list[str]:
        """Waits `patience` seconds for the processes of all hosts to end; kills the rest and names them."""
        jobs = [job for host in self.hosts for job in self.fabric.jobs(host)]
        _, alive = psutil.wait_procs(jobs, timeout=patience)
        names = [textwrap.shorten(shlex.join(each.cmdline()), 200) for each in alive if each.is_running()]
        for process in alive:
            process.kill()
        return names

    def shape(self) -> dict[str, dict[str, list[str]]]:
        """The addresses of each host's interfaces and what is mounted in it, which a test may change for a while."""
        return {host: {"addresses": self._addresses(host), "mounts": self._mounts(host)} for host in self.hosts}

    def _addresses(self, host: str) -> list[str]:
        shown = programs.run(*programs.nsenter(self.first_process(host), ["net"]), "ip", "-json", "address", "show")
        interfaces = json.loads(shown)
        return sorted(
            f"{interface['ifname']} {address.get('local', 'none')}/{address.get('prefixlen', 0)}"
            for interface in interfaces
            for address in [{}, *interface["addr_info"]]
            if address.get("family") != "inet6"  # which come a second after their interface
        )

    def _mounts(self, host: str) -> list[str]:
        lines = Path(f"/proc/{self.first_process(host)}/mounts").read_text().splitlines()
        # But for the user's ~/.ssh, over which a host's own goes with it if somebody removes it from this machine
        return sorted(line.split()[1] for line in lines if not line.split()[1].endswith("/.ssh"))

    def first_process(self, host: str) -> int:
        """The process that holds a host's namespaces."""
        return self.fabric._host(host)

    def down(self) -> None:
        result = self.command("down")
        assert result.status == 0, result.output
        assert not self.fabric.state.exists()


class SharedCluster:
    """Two hosts of four slots, with Slurm where it is installed; a new one once a test has left it changed."""

    def __init__(self, folder: Path) -> None:
        """`folder`: for the fabric's state."""
        self._state = folder / "fabric"
        self._cluster: Cluster | None = None
        self._shape: dict[str, dict[str, list[str]]] = {}

    def get(self) -> Cluster:
        """The cluster as it was when it came up."""
        if self._cluster is None:
            self._cluster = Cluster.start(self._state, 2, 4, "--rate", RATE, *_slurm())
            self._shape = self._cluster.shape()
        return self._cluster

    def set_back(self) -> list[str]:
        """Ends jobs and gives links their rate again; returns what else is not as it was, and then takes it down."""
        cluster = self.get()
        left = cluster.end_jobs()
        cluster.set_links("up")
        for host in cluster.hosts:
            if network.link_of(cluster.fabric._switch(), host).rate != parse_rate(RATE):
                cluster.fabric.link(host, RATE)
        shape = cluster.shape()
        for host in cluster.hosts:
            for kind, before in self._shape[host].items():
                new, gone = Counter(shape[host][kind]) - Counter(before), Counter(before) - Counter(shape[host][kind])
                left += [f"{kind} of {host}: {each} is new" for each in new]
                left += [f"{kind} of {host}: {each} is gone" for each in gone]
        if left:
            self.close()
        return left

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.down()
            self._cluster = None


def _slurm() -> list[str]:
    try:
        programs.require(slurm=True)
    except HvdlmError:
        return []
    return ["--slurm"]
