"""The program that doctor runs on each host of a list, over ssh. Its standard input and output are lines of JSON.

`python -m hvdlm.cluster.doctor.host_probe report` writes a report of the host. `... connect SECONDS` listens on a TCP
port, writes the port's number, reads a list of addresses and ports, and writes for each whether it could connect to it
within SECONDS.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from ipaddress import IPv4Interface
from pathlib import Path

import psutil

from hvdlm.cluster.doctor.software import installed_software
from hvdlm.cluster.versions import output_of
from hvdlm.comm.interfaces import Interface, own_interfaces
from hvdlm.cores import usable_cores

# The variable with the PATH of the ssh session, before doctor replaced it by the PATH of the launching machine.
SESSION_PATH = "HVDLM_SESSION_PATH"
# Programs that launchers find on a host's PATH.
PROGRAMS = ("hvdlm", "prted")

# Starts each line of the probe. Other lines come from the shell, such as an `echo` in ~/.bashrc.
LINE_PREFIX = "hvdlm-probe: "


@dataclass(frozen=True)
class HostReport:
    """What one host reports."""

    hostname: str
    own_address: str  # to which it resolves its own name; "" if that fails
    software: dict[str, str]
    interfaces: list[Interface]
    cores: int  # that the probe may use, by its CPU affinity and quota
    gpus: int
    shared_memory: int  # bytes free in /dev/shm
    programs: dict[str, str]  # paths of PROGRAMS on the PATH of an ssh session; "" if not found


def report() -> HostReport:
    """Makes the report of this host."""
    hostname = socket.gethostname()
    session = os.environ.get(SESSION_PATH, os.defpath)
    return HostReport(
        hostname=hostname,
        own_address=_resolve(hostname),
        software=installed_software(),
        interfaces=own_interfaces(),
        cores=usable_cores(),
        gpus=_gpus(),
        shared_memory=psutil.disk_usage("/dev/shm").free,
        programs={name: shutil.which(name, path=session) or "" for name in PROGRAMS},
    )


def read_report(line: str) -> HostReport:
    """Parses the line of a report. Raises ValueError, KeyError or TypeError if another version of hvdlm wrote it."""
    fields = json.loads(line.removeprefix(LINE_PREFIX))
    interfaces = [
        Interface(each["name"], IPv4Interface(each["address"]), each["megabits"]) for each in fields["interfaces"]
    ]
    return HostReport(**{**fields, "interfaces": interfaces})


def _resolve(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _gpus() -> int:
    devices = list(Path("/dev").glob("nvidia[0-9]*"))
    return len(devices) or output_of("nvidia-smi", "-L").count("GPU ")


def _write_line(value: object) -> None:
    print(LINE_PREFIX + json.dumps(value, default=str), flush=True)


def _connect(seconds: float) -> None:
    """Listens and connects as described at the top of this file, until standard input ends.

    Nothing accepts the incoming connections: the kernel completes them and keeps them in the backlog.
    """

    def can_connect(target: tuple[str, int]) -> bool:
        try:
            with socket.create_connection((target[0], target[1]), timeout=seconds):
                return True
        except OSError:
            return False

    with socket.create_server(("", 0), backlog=4096) as listener:
        _write_line(listener.getsockname()[1])
        others = json.loads(sys.stdin.readline() or "[]")
        with ThreadPoolExecutor(max_workers=1024) as pool:
            _write_line(list(pool.map(can_connect, others)))
        sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1] == "report":
        _write_line(asdict(report()))
    else:
        _connect(float(sys.argv[2]))
