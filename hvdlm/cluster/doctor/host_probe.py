"""What doctor runs on each host of a list, by ssh; speaks JSON on standard input and output.

`python -m hvdlm.cluster.doctor.host_probe report` tells of the host it runs on. `... meet SECONDS` listens, tells its
port, reads the addresses at which others listen, and tells which of them it could connect to in SECONDS each.
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
from hvdlm.cluster.horovod_build.target import output_of
from hvdlm.comm.interfaces import Interface, own_interfaces

# The PATH of the session that ssh opened, before doctor gave the probe that of the one who starts the job.
SESSION_PATH = "HVDLM_SESSION_PATH"
# Programs that a launcher starts on a host by name.
STARTED_BY_NAME = ("hvdlm", "prted")

# Begins each line of the probe: shells may have more to say (an `echo` in ~/.bashrc).
MARK = "hvdlm-probe: "


@dataclass(frozen=True)
class HostReport:
    """A host as it sees itself."""

    hostname: str
    own_address: str  # to which it resolves its own name; empty if to none
    software: dict[str, str]
    interfaces: list[Interface]
    cores: int  # that a process may use
    gpus: int
    shared_memory: int  # bytes that are free in /dev/shm
    programs: dict[str, str]  # where the PATH of a session by ssh finds STARTED_BY_NAME; empty where it does not


def report() -> HostReport:
    """Looks at this host."""
    hostname = socket.gethostname()
    session = os.environ.get(SESSION_PATH, os.defpath)
    return HostReport(
        hostname=hostname,
        own_address=_resolve(hostname),
        software=installed_software(),
        interfaces=own_interfaces(),
        cores=len(os.sched_getaffinity(0)),
        gpus=_gpus(),
        shared_memory=psutil.disk_usage("/dev/shm").free,
        programs={name: shutil.which(name, path=session) or "" for name in STARTED_BY_NAME},
    )


def read_report(line: str) -> HostReport:
    """A report from its line; raises ValueError, KeyError or TypeError for that of another version of hvdlm."""
    fields = json.loads(line.removeprefix(MARK))
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


def _tell(value: object) -> None:
    print(MARK + json.dumps(value, default=str), flush=True)


def _meet(seconds: float) -> None:
    """Connections wait in the listener's queue, which takes them without our help, until standard input ends."""

    def can_connect(place: tuple[str, int]) -> bool:
        try:
            with socket.create_connection((place[0], place[1]), timeout=seconds):
                return True
        except OSError:
            return False

    with socket.create_server(("", 0), backlog=4096) as listener:
        _tell(listener.getsockname()[1])
        others = json.loads(sys.stdin.readline() or "[]")
        with ThreadPoolExecutor(max_workers=1024) as pool:
            _tell(list(pool.map(can_connect, others)))
        sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1] == "report":
        _tell(asdict(report()))
    else:
        _meet(float(sys.argv[2]))
