"""An emulated cluster for tests: `hvdlm fabric`, programs run in its hosts, and nothing left behind on any of them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from launcher import BIN, Result, run

from hvdlm.cluster.fabric.fabric import Fabric
from hvdlm.cluster.fabric.programs import require
from hvdlm.errors import HvdlmError


def skip_without_fabric(slurm: bool) -> None:
    """Skips the test, and says why, where no fabric can be."""
    try:
        require(slurm)
    except HvdlmError as error:
        pytest.skip(str(error))


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
        skip_without_fabric(slurm="--slurm" in options)
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
        if may_go_on:
            return run(inside, deadline, extra, cwd)
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
        names = [shlex.join(each.cmdline()) for each in alive if each.is_running()]
        for process in alive:
            process.kill()
        return names

    def down(self) -> None:
        result = self.command("down")
        assert result.status == 0, result.output
        assert not self.fabric.state.exists()
