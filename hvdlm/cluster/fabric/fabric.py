"""An emulated cluster on one machine: hosts h1, h2, ..., each with a network, name, processes and sshd of its own.

Each host has a process that is process 1 of the host's namespaces (host.py). One more process holds the namespace of
the switch that connects the hosts (network.py). When such a process ends, the kernel ends everything else in its
namespaces, so ending these processes ends the fabric. They are found by their command lines, which contain the path of
the state directory; so they can be found even after a crash of `hvdlm fabric`.
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
from hvdlm.cluster.fabric.config_files import TMPDIR, host_names, write_config_files
from hvdlm.cluster.fabric.programs import nsenter, path_of, require, run
from hvdlm.comm.rate import parse_rate, rate_text
from hvdlm.errors import HvdlmError

MAX_HOSTS = 64

_NAMESPACES = ("net", "uts", "mount", "pid")
_READY_SECONDS = 30.0
_DAEMONS = ("sshd", "munged", "slurmctld", "slurmd")


class Fabric:
    """A fabric and its state directory. Several can be up at once, each with a state directory of its own."""

    def __init__(self, state: Path | None = None) -> None:
        """`state`: the state directory; None: the value of HVDLM_FABRIC, or /var/lib/hvdlm/fabric."""
        self.state = (state or Path(os.environ.get("HVDLM_FABRIC", "/var/lib/hvdlm/fabric"))).absolute()

    def up(self, hosts: int, slots: int, rate: str | None, slurm: bool) -> None:
        """Starts `hosts` hosts of `slots` slots with links of `rate` ("1gbit"; None: unlimited), and Slurm if `slurm`.

        On an error everything that was started is ended. Raises HvdlmError if the fabric cannot start.
        """
        require(slurm)
        if not 1 <= hosts <= MAX_HOSTS or slots < 1:
            raise HvdlmError(f"a fabric has 1 to {MAX_HOSTS} hosts of 1 or more slots, not {hosts} of {slots}")
        bits = parse_rate(rate) if rate else None
        self._make_state()
        try:
            names = host_names(hosts)
            write_config_files(self.state, names, slots, slurm)
            switch = self._start(_module_of("network", self.state), self.state / "switch.log", ["net"])
            started = [self._start_host(name) for name in names]
            _await_ready(switch, "the switch", self.state / "switch.log")
            for name, host in zip(names, started, strict=True):
                network.connect(_child(switch), _child(host), name)
                if bits:
                    network.limit_rate(_child(switch), _child(host), name, bits)
            for name, host in zip(names, started, strict=True):
                _await_ready(host, name, self.state / name / "log")
            if slurm:
                self._await_slurm()
        except BaseException:
            self.down()
            raise
        print(f"{hosts} hosts are up: {', '.join(names)}; their host list: {self.state / 'hostfile'}")

    def run(self, host: str, program: Sequence[str]) -> int:
        """Runs a program in a host, with this working directory and environment except TMPDIR; returns its exit status.

        SIGTERM, SIGHUP and SIGUSR1 are passed on to it; Ctrl-C in a terminal reaches it directly.
        """
        in_host = nsenter(self._host(host), _NAMESPACES)
        process = subprocess.Popen([*in_host, "env", f"--chdir={Path.cwd()}", f"TMPDIR={TMPDIR}", *program])

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
        """Takes a host's link down ("down") or up ("up"), or limits its rate ("100mbit"), also while it is in use."""
        process, switch = self._host(host), self._switch()
        if change == "down":
            network.cut_link(switch, host)
        elif change == "up":
            network.heal_link(switch, host, self._hosts().values())
        else:
            network.limit_rate(switch, process, host, parse_rate(change))

    def jobs(self, host: str) -> list[psutil.Process]:
        """The processes of a host other than its daemons: those started by `run`, ssh or Slurm."""
        init = self._host(host)
        namespace = _process_namespace(init)
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if _process_namespace(process.pid) != namespace or process.pid == init:
                    continue
                is_daemon = process.name() in _DAEMONS and process.ppid() == init
                if not is_daemon and process.name() != "slurmscriptd":  # a part of slurmctld
                    found.append(process)
        return found

    def print_status(self) -> None:
        """Prints each host with its address, its link and the processes on it."""
        hosts = self._hosts()
        if not hosts:
            print(f"no fabric is up in {self.state}")
            return
        switch = self._switch()
        table = Table("host", "address", "link", "rate", "daemons", "other processes")
        for name, process in hosts.items():
            link = network.link_of(switch, name)
            daemons = [child.name() for child in psutil.Process(process).children() if child.name() in _DAEMONS]
            table.add_row(
                name,
                str(network.address(name)),
                "up" if link.is_up else "down",
                rate_text(link.rate) if link.rate else "unlimited",
                " ".join(sorted(daemons)),
                str(len(self.jobs(name))),
            )
        Console().print(table)
        print(f"host list: {self.state / 'hostfile'}")

    def down(self) -> None:
        """Ends every process of the hosts and removes the state directory; does nothing if there is no fabric."""
        deadline = time.monotonic() + _READY_SECONDS
        while processes := self._processes():
            if time.monotonic() > deadline:
                raise HvdlmError(f"processes {', '.join(str(each.pid) for each in processes)} of the fabric do not end")
            # `unshare` ends by itself after its child has ended; it is only killed if it has no child yet.
            for process in [each for each in processes if each.info["name"] != "unshare"] or processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=1)
        if self._is_fabric():
            shutil.rmtree(self.state)

    def _make_state(self) -> None:
        """Makes the empty state directory. Raises HvdlmError if that is not possible."""
        if self._processes():
            raise HvdlmError(
                f"a fabric is up in {self.state}: end it with `hvdlm fabric down`, or give another --state directory"
            )
        if self._is_fabric():  # left by a crash of the machine
            shutil.rmtree(self.state)
        try:
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(self.state.iterdir()):
                raise HvdlmError(
                    f"{self.state} contains other files than a fabric's: give --state an empty or new directory"
                )
        except OSError as error:
            raise HvdlmError(f"cannot keep a fabric's state in {self.state}: {error.strerror}") from None
        if self.state.is_relative_to("/run") or self.state.is_relative_to("/dev"):
            raise HvdlmError(
                f"{self.state}: hosts have a /run and a /dev/shm of their own; give --state another directory"
            )

    def _is_fabric(self) -> bool:
        """Whether the state directory is a fabric's."""
        return (self.state / "hostfile").exists()

    def _start_host(self, name: str) -> subprocess.Popen[bytes]:
        namespaces = [*_NAMESPACES, "mount-proc"]
        return self._start([*_module_of("host", self.state), name], self.state / name / "log", namespaces)

    def _start(self, module: Sequence[str], log: Path, namespaces: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a module in new namespaces, as a daemon: without the caller's environment, session and terminal."""
        unshare = ["unshare", "--fork", "--kill-child", *(f"--{namespace}" for namespace in namespaces)]
        with log.open("ab") as file:
            return subprocess.Popen(
                [*unshare, sys.executable, *module],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
                cwd="/",
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
            )

    def _await_slurm(self) -> None:
        """Waits until Slurm reports all nodes as idle."""
        command = [*nsenter(self._host("h1"), _NAMESPACES), path_of("sinfo"), "--noheader", "--format", "%T"]
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
            f"the log of slurmctld ends with {_last_line(self.state / 'slurmctld.log')!r}, "
            f"that of slurmd on h1 with {_last_line(self.state / 'h1' / 'slurmd.log')!r}"
        )

    def _host(self, name: str) -> int:
        """The pid of a host's process 1. Raises HvdlmError if there is no such host."""
        hosts = self._hosts()
        if not hosts:
            raise HvdlmError(f"no fabric is up in {self.state}: start one with `hvdlm fabric up --hosts 2`")
        if name not in hosts:
            raise HvdlmError(f"the fabric has no host {name}, only {', '.join(hosts)}")
        return hosts[name]

    def _hosts(self) -> dict[str, int]:
        """The pids of the hosts' processes 1, by host name, in order."""
        found = self._find("host")
        return {name: found[name] for name in host_names(MAX_HOSTS) if name in found}

    def _switch(self) -> int:
        """The pid of the process that holds the switch."""
        return self._find("network")[""]

    def _find(self, module: str) -> dict[str, int]:
        """The pids of a module's processes, by host name ("" for the switch)."""
        commands = [(process.pid, process.info["cmdline"]) for process in self._processes()]
        return {
            "".join(command[4:]): pid for pid, command in commands if command[1:4] == _module_of(module, self.state)
        }

    def _processes(self) -> list[psutil.Process]:
        """The processes that `_start` has started for this fabric: each `unshare` and its child."""
        modules = [_module_of(module, self.state) for module in ("host", "network")]

        def is_of_fabric(command: list[str]) -> bool:
            return any(command[i : i + 3] == module for i in range(len(command) - 2) for module in modules)

        return [
            process
            for process in psutil.process_iter(["name", "cmdline"])
            if is_of_fabric(process.info["cmdline"] or [])
        ]


def _module_of(module: str, state: Path) -> list[str]:
    """The arguments with which a process of a fabric is started, and by which it is found."""
    return ["-m", f"hvdlm.cluster.fabric.{module}", str(state)]


def _process_namespace(process: int) -> int:
    """Identifies the PID namespace of a process."""
    return Path(f"/proc/{process}/ns/pid").stat().st_ino


def _child(unshare: subprocess.Popen[bytes]) -> int:
    """The pid of the process that `unshare` has started in new namespaces."""
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
