"""The commands that start ranks on the hosts of a list, with only the options that these hosts need."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from hvdlm.cluster.doctor.probed_hosts import ProbedHost
from hvdlm.cluster.doctor.remote_probe import SEARCH_PATHS
from hvdlm.cluster.doctor.routes import Route


def launch_commands(hostfile: Path, hosts: Sequence[ProbedHost], route: Route | None) -> list[str]:
    """One command for each launcher that all hosts have. `route`: None if all ranks run on this machine."""
    software = hosts[0].report.software
    commands = []
    if software["Horovod"] != "none" and (route is None or len(route.names) == 1):
        commands.append(_horovodrun(hostfile, hosts, route))
    if re.match(r"Open MPI ([5-9]|\d\d)", software["MPI"]):
        commands.append(_mpirun(hostfile, hosts, route))
    return commands


def _horovodrun(hostfile: Path, hosts: Sequence[ProbedHost], route: Route | None) -> str:
    words = [_name("horovodrun"), *_ranks(hostfile, hosts)]
    finds_mpi = shutil.which("mpirun") and _has_everywhere(hosts, "prted")
    if "Gloo" in hosts[0].report.software["Horovod"] and not finds_mpi:
        words.append("--gloo")  # with MPI it would look for mpirun and prted only on the PATH
    if route:
        words += ["--network-interfaces", *route.names]
    return shlex.join([*words, _name("hvdlm")]) + " train CONFIG"


def _mpirun(hostfile: Path, hosts: Sequence[ProbedHost], route: Route | None) -> str:
    # If mpirun is called by its absolute path, Open MPI expects prted at the same path on every host.
    launcher = "mpirun" if _has_everywhere(hosts, "prted") else shutil.which("mpirun") or _installed("mpirun")
    words = [_name(launcher), *_ranks(hostfile, hosts), "--bind-to", "none"]
    if os.geteuid() == 0 and "OMPI_ALLOW_RUN_AS_ROOT" not in os.environ:
        words.append("--allow-run-as-root")
    if route:
        include = ",".join(route.names if len(route.networks) > 1 and len(route.names) == 1 else route.networks)
        words += ["--mca", "btl_tcp_if_include", include, "--prtemca", "prte_if_include", include]
        for name in SEARCH_PATHS:
            if name in os.environ and not (name == "PATH" and _has_everywhere(hosts, "hvdlm")):
                words += ["-x", name]
    return shlex.join([*words, _name("hvdlm")]) + " train CONFIG"


def _ranks(hostfile: Path, hosts: Sequence[ProbedHost]) -> list[str]:
    return ["-np", str(sum(host.entry.slots for host in hosts)), "--hostfile", str(hostfile)]


def _has_everywhere(hosts: Sequence[ProbedHost], program: str) -> bool:
    """Whether the PATH of an ssh session, which differs from a terminal's, has the same program on every host."""
    local = shutil.which(program)
    return all(host.is_local or host.report.programs[program] == local != "" for host in hosts)


def _name(program: str) -> str:
    """A program's name if it is on the PATH here, else its path in this environment."""
    return program if shutil.which(program) else _installed(program)


def _installed(program: str) -> str:
    return str(Path(sysconfig.get_path("scripts"), program))
