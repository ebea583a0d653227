"""A cluster in a box: hosts h1, h2, ... on this machine, each with its own network, name, processes and sshd.

A host is process 1 of its own namespaces (host.py); the switch between them is a process too (switch.py). These
processes are the whole of a fabric: the kernel takes everything else of a host with its process 1. They are
found by their command lines, which hold the path of the state directory, so no crash can lose one.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console
from rich.table import Table

from hvdlm.cluster.fabric import network
from hvdlm.cluster.fabric.files import TEMPORARY, host_names, write_files
from hvdlm.cluster.fabric.programs import enter, path_of, require, run
from hvdlm.comm.rate import parse_rate, rate_text
from hvdlm.errors import HvdlmError

MOST_HOSTS = 64

_NAMESPACES = ("net", "uts", "mount", "pid")
_READY_SECONDS = 30.0
_DAEMONS = ("sshd", "munged", "slurmctld", "slurmd")


class Fabric:
    """The fabric whose state lies in one directory; several can be up at once, each in a directory of its own."""

    def __init__(self, state: Path | None = None) -> None:
        """`state`: its directory; None: HVDLM_FABRIC, or /var/lib/hvdlm/fabric."""
        self.state = (state or Path(os.environ.get("HVDLM_FABRIC", "/var/lib/hvdlm/fabric"))).absolute()

    def up(self, hosts: int, slots: int, rate: str | None, slurm: bool) -> None:
        """Starts `hosts` hosts of `slots` slots, links of `rate` ("1gbit"; None: unlimited), with Slurm if wanted.

        Raises HvdlmError, and leaves nothing behind, where that cannot be.
        """
        require(slurm)
        if not 1 <= hosts <= MOST_HOSTS or slots < 1:
            raise HvdlmError(f"a fabric has 1 to {MOST_HOSTS} hosts of 1 or more slots, not {hosts} of {slots}")
        bits = parse_rate(rate) if rate else None
        self._make_state()
        try:
            names = host_names(hosts)
            write_files(self.state, names, slots, slurm)
            switch = self._start(_module_of("switch", self.state), self.state / "switch.log", ["net"])
            started = [self._start_host(name) for name in names]
            _await_ready(switch, "the switch", self.state / "switch.log")
            for index, host in enumerate(started, start=1):
                network.connect(_inside(switch), _inside(host), names[index - 1], index)
                if bits:
                    network.shape(_inside(switch), _inside(host), names[index - 1], bits)
            for name, host in zip(names, started, strict=True):
                _await_ready(host, name, self.state / name / "log")
            if slurm:
                self._await_slurm()
        except BaseException:
            self.down()
            raise
        print(f"{hosts} hosts are up: {', '.join(names)}; their host list: {self.state / 'hostfile'}")

    def run(self, host: str, program: Sequence[str]) -> int:
        """Runs a program inside a host, in this directory and, but for TMPDIR, environment; returns its exit status.

        SIGTERM, SIGHUP and SIGUSR1 are passed on to it; Ctrl-C in a terminal reaches it by itself.
        """
        inside = enter(self._host(host), _NAMESPACES)
        process = subprocess.Popen([*inside, "env", f"--chdir={Path.cwd()}", f"TMPDIR={TEMPORARY}", *program])

        def pass_on(number: int, _: FrameType | None) -> None:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children():
                    child.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, pass_on)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        status = process.wait()
        return 128 - status if status < 0 else status

    def link(self, host: str, change: str) -> None:
        """Cuts a host's link ("down"), heals it ("up"), or gives it a rate ("100mbit"), whatever runs on it."""
        inside, switch = self._host(host), self._switch()
        if change in ("up", "down"):
            network.plug(switch, host, change == "up")
        else:
            network.shape(switch, inside, host, parse_rate(change))

    def jobs(self, host: str) -> list[psutil.Process]:
        """The processes of a host other than its daemons: what was run there, and what ssh and Slurm started."""
        first = self._host(host)
        namespace = _process_namespace(first)
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if _process_namespace(process.pid) != namespace or process.pid == first:
                    continue
                is_daemon = process.name() in _DAEMONS and process.ppid() == first
                if not is_daemon and process.name() != "slurmscriptd":  # a part of slurmctld
                    found.append(process)
        return found

    def print_status(self) -> None:
        """Prints each host with its address, its link and what runs on it."""
        hosts = self._hosts()
        if not hosts:
            print(f"no fabric is up in {self.state}")
            return
        switch = self._switch()
        table = Table("host", "address", "link", "rate", "daemons", "other processes")
        for index, (name, process) in enumerate(hosts.items(), start=1):
            link = network.link_of(switch, name)
            daemons = [child.name() for child in psutil.Process(process).children() if child.name() in _DAEMONS]
            table.add_row(
                name,
                str(network.address(index)),
                "up" if link.is_up else "down",
                rate_text(link.rate) if link.rate else "unlimited",
                " ".join(sorted(daemons)),
                str(len(self.jobs(name))),
            )
        Console().print(table)
        print(f"host list: {self.state / 'hostfile'}")

    def down(self) -> None:
        """Ends every process of the hosts and removes the state directory; does nothing where no fabric is."""
        deadline = time.monotonic() + _READY_SECONDS
        while processes := self._processes():
            if time.monotonic() > deadline:
                raise HvdlmError(f"processes {', '.join(str(each.pid) for each in processes)} of the fabric do not end")
            # An `unshare` ends with its child, once it has buried it: it is killed only if it has none yet
            for process in [each for each in processes if each.info["name"] != "unshare"] or processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=1)
        if self._is_ours():
            shutil.rmtree(self.state)

    def _make_state(self) -> None:
        if self._processes():
            raise HvdlmError(
                f"a fabric is up in {self.state}: end it with `hvdlm fabric down`, or give another --state directory"
            )
        if self._is_ours():  # the machine was switched off under it
            shutil.rmtree(self.state)
        try:
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(self.state.iterdir()):
                raise HvdlmError(f"{self.state} holds other things than a fabric: give --state a directory of its own")
        except OSError as error:
            raise HvdlmError(f"cannot keep a fabric's state in {self.state}: {error.strerror}") from None
        if self.state.is_relative_to("/run") or self.state.is_relative_to("/dev"):
            raise HvdlmError(f"{self.state}: hosts have a /run and a /dev/shm of their own; give --state another place")

    def _is_ours(self) -> bool:
        return (self.state / "hostfile").exists()

    def _start_host(self, name: str) -> subprocess.Popen[bytes]:
        namespaces = [*_NAMESPACES, "mount-proc"]
        return self._start([*_module_of("host", self.state), name], self.state / name / "log", namespaces)

    def _start(self, module: Sequence[str], log: Path, namespaces: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a module in new namespaces; its environment is a daemon's, with nothing of the caller's."""
        apart = ["unshare", "--fork", "--kill-child", *(f"--{namespace}" for namespace in namespaces)]
        with log.open("ab") as file:
            return subprocess.Popen(
                [*apart, sys.executable, *module],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
                cwd="/",
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            )

    def _await_slurm(self) -> None:
        command = [*enter(self._host("h1"), _NAMESPACES), path_of("sinfo"), "--noheader", "--format", "%T"]
        deadline = time.monotonic() + _READY_SECONDS
        states = ""
        while time.monotonic() < deadline:
            with suppress(HvdlmError):  # slurmctld does not answer yet
                states = " ".join(run(*command).split())
                if set(states.split()) == {"idle"}:
                    return
            time.sleep(0.1)
        raise HvdlmError(
            f"Slurm's nodes are {states or 'silent'} after {_READY_SECONDS:g} s: "
            f"slurmctld says {_last_line(self.state / 'slurmctld.log')!r}, "
            f"slurmd on h1 {_last_line(self.state / 'h1' / 'slurmd.log')!r}"
        )

    def _host(self, name: str) -> int:
        hosts = self._hosts()
        if not hosts:
            raise HvdlmError(f"no fabric is up in {self.state}: start one with `hvdlm fabric up --hosts 2`")
        if name not in hosts:
            raise HvdlmError(f"the fabric has no host {name}, only {', '.join(hosts)}")
        return hosts[name]

    def _hosts(self) -> dict[str, int]:
        """The processes 1 of all hosts, by name, in order."""
        found = self._find("host")
        return {name: found[name] for name in host_names(MOST_HOSTS) if name in found}

    def _switch(self) -> int:
        return self._find("switch")[""]

    def _find(self, module: str) -> dict[str, int]:
        """Processes 1 by the name of their host ("" for the switch)."""
        commands = [(process.pid, process.info["cmdline"]) for process in self._processes()]
        return {"".join(words[4:]): pid for pid, words in commands if words[1:4] == _module_of(module, self.state)}

    def _processes(self) -> list[psutil.Process]:
        """What `_start` has started for this fabric: each `unshare`, and its child, the process 1 of a host."""
        modules = [_module_of(module, self.state) for module in ("host", "switch")]

        def is_ours(words: list[str]) -> bool:
            return any(words[at : at + 3] == module for at in range(len(words) - 2) for module in modules)

        return [
            process for process in psutil.process_iter(["name", "cmdline"]) if is_ours(process.info["cmdline"] or [])
        ]


def _module_of(module: str, state: Path) -> list[str]:
    """The words by which a process of a fabric is started, and found again."""
    return ["-m", f"hvdlm.cluster.fabric.{module}", str(state)]


def _process_namespace(process: int) -> int:
    return Path(f"/proc/{process}/ns/pid").stat().st_ino


def _inside(unshare: subprocess.Popen[bytes]) -> int:
    """The process that unshare has started in new namespaces."""
    while not (children := psutil.Process(unshare.pid).children()):
        time.sleep(0.005)
    return int(children[0].pid)


def _await_ready(process: subprocess.Popen[bytes], name: str, log: Path) -> None:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], _READY_SECONDS)
    if not (ready and process.stdout.readline() == b"ready\n"):
        raise HvdlmError(f"{name} of the fabric has not started: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "nothing"
