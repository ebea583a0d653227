"""Versions of installed programs, read from what they print."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def output_of(*command: str | Path) -> str:
    """What a command prints on standard output and standard error; empty if it fails or takes over 60 seconds."""
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout if run.returncode == 0 else ""


def version_in(text: str) -> str:
    """The first dotted number in a text; empty if there is none."""
    found = re.search(r"\d+(\.\d+)+", text)
    return found.group() if found else ""


def mpi_family(version_text: str) -> str:
    """The name of an MPI implementation, from the output of its `mpirun --version`; "MPI" if that is unknown."""
    names = {"Open MPI": "Open MPI", "OpenRTE": "Open MPI", "HYDRA": "MPICH", "MPICH": "MPICH", "Intel": "Intel MPI"}
    return next((family for word, family in names.items() if word in version_text), "MPI")
