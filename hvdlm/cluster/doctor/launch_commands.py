"""The command lines that start ranks on the hosts of a list, with what these hosts need and nothing else."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from hvdlm.cluster.doctor.meeting import Route
from hvdlm.cluster.doctor.members import Member
from hvdlm.cluster.doctor.remote import SEARCH_PATHS


def launch_lines(hostfile: Path, members: Sequence[Member], route: Route | None) -> list[str]:
    """Lines to paste, for those launchers that all hosts have; `route`: None where all ranks run on this machine."""
    software = members[0].report.software
    lines = []
    if software["Horovod"] != "none" and (route is None or len(route.names) == 1):
        lines.append(_horovodrun(hostfile, members, route))
    if re.match(r"Open MPI ([5-9]|\d\d)", software["MPI"]):
        lines.append(_mpirun(hostfile, members, route))
    return lines


def _horovodrun(hostfile: Path, members: Sequence[Member], route: Route | None) -> str:
    words = [_name("horovodrun"), *_ranks(hostfile, members)]
    mpi_is_found = shutil.which("mpirun") and _has_everywhere(members, "prted")
    if "Gloo" in members[0].report.software["Horovod"] and not mpi_is_found:
        words.append("--gloo")  # under MPI it finds mpirun and its prted by the PATH alone
    if route:
        words += ["--network-interfaces", *route.names]
    return shlex.join([*words, _name("hvdlm")]) + " train CONFIG"


def _mpirun(hostfile: Path, members: Sequence[Member], route: Route | None) -> str:
    # Called by its absolute path, Open MPI looks for its own prted under the same one on every host.
    launcher = "mpirun" if _has_everywhere(members, "prted") else shutil.which("mpirun") or _installed("mpirun")
    words = [_name(launcher), *_ranks(hostfile, members), "--bind-to", "none"]
    if os.geteuid() == 0 and "OMPI_ALLOW_RUN_AS_ROOT" not in os.environ:
        words.append("--allow-run-as-root")
    if route:
        include = ",".join(route.names if len(route.networks) > 1 and len(route.names) == 1 else route.networks)
        words += ["--mca", "btl_tcp_if_include", include, "--prtemca", "prte_if_include", include]
        for name in SEARCH_PATHS:
            if name in os.environ and not (name == "PATH" and _has_everywhere(members, "hvdlm")):
                words += ["-x", name]
    return shlex.join([*words, _name("hvdlm")]) + " train CONFIG"


def _ranks(hostfile: Path, members: Sequence[Member]) -> list[str]:
    return ["-np", str(sum(member.host.slots for member in members)), "--hostfile", str(hostfile)]


def _has_everywhere(members: Sequence[Member], program: str) -> bool:
    """Does the PATH of a session on every host, which is not that of the user's terminal, lead to the same program?"""
    here = shutil.which(program)
    return all(member.is_here or member.report.programs[program] == here != "" for member in members)


def _name(program: str) -> str:
    """As to be typed: by its name alone where the PATH here leads to that of this environment."""
    return program if shutil.which(program) else _installed(program)


def _installed(program: str) -> str:
    return str(Path(sysconfig.get_path("scripts"), program))
