"""The set-ups of a benchmark: this machine as it is, or emulated hosts whose links have a given rate."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.processes import FORWARDED_VARIABLES, find_program, mpirun, on_host
from hvdlm.cluster.fabric import network
from hvdlm.cluster.fabric.fabric import Fabric
from hvdlm.cluster.fabric.programs import require
from hvdlm.comm.rate import parse_rate
from hvdlm.errors import HvdlmError

ONE_HOST = "one-host"


@dataclass(frozen=True)
class Setup:
    """Hosts and the links between them."""

    name: str
    ranks: int  # one per host, except on one host
    rate: str | None  # of each host's link, as "1gbit"; None: all ranks are on this machine


@dataclass(frozen=True)
class Cluster:
    """The running hosts of a set-up."""

    setup: Setup
    launcher: list[str]  # the command that starts its ranks; an absolute program path follows
    interface: str | None  # the network interface that carries all messages between hosts; None: one host
    fabric: Path | None  # the state of the emulated hosts h1, h2, ...; None: one host


def parse_setup(name: str, ranks: int) -> Setup:
    """The set-up called `name`: one-host with `ranks` ranks, or HOSTSxRATE as in 2x1gbit with one rank per host.

    Raises HvdlmError for anything else.
    """
    if name == ONE_HOST:
        return Setup(name, ranks, None)
    found = re.fullmatch(r"(\d+)x(\w+)", name)
    if not found or int(found.group(1)) < 2:
        raise HvdlmError(
            f"set-up {name!r} is unknown: give {ONE_HOST}, or two or more hosts and the rate of their links, "
            "as in 2x1gbit or 4x100mbit"
        )
    parse_rate(found.group(2))
    return Setup(name, int(found.group(1)), found.group(2))


def available_setups(setups: Sequence[Setup]) -> list[Setup]:
    """Those of `setups` that this user can run on this machine; prints which are left out, and why.

    Raises HvdlmError if none is left.
    """
    emulated = [setup for setup in setups if setup.rate]
    try:
        if emulated:
            require(slurm=False)
        return list(setups)
    except HvdlmError as error:
        names = ", ".join(setup.name for setup in emulated)
        others = [setup for setup in setups if not setup.rate]
        if not others:
            raise HvdlmError(f"{names} cannot be set up: {error}") from None
        print(f"without {names}: {error}", file=sys.stderr)
        return others


@contextmanager
def open_cluster(setup: Setup, state: Path) -> Iterator[Cluster]:
    """Starts the hosts of a set-up and removes them afterwards.

    `state`: a directory for the fabric's state, which must not exist yet. Raises HvdlmError if there is no mpirun, or
    if the hosts cannot be started.
    """
    command = mpirun(setup.ranks)
    if setup.rate is None:
        yield Cluster(setup, [*command, "--oversubscribe"], None, None)
        return
    fabric = Fabric(state)
    fabric.up(setup.ranks, 1, setup.rate, slurm=False)
    try:
        options = ["--hostfile", str(state / "hostfile"), *FORWARDED_VARIABLES]
        yield Cluster(setup, [*on_host(state, "h1"), *command, *options], network.INTERFACE, state)
    finally:
        fabric.down()


def horovodrun(cluster: Cluster, controller: str) -> list[str]:
    """The horovodrun command that starts the ranks of a cluster, without a program; `controller`: "mpi" or "gloo"."""
    path = find_program("horovodrun", "run `hvdlm install-horovod`")
    ranks = cluster.setup.ranks
    command = [path, f"--{controller}", "-np", str(ranks)]
    if cluster.fabric is None:
        return [*command, "-H", f"localhost:{ranks}"]
    assert cluster.interface is not None
    hosts = ",".join(f"h{number}:1" for number in range(1, ranks + 1))
    return [*on_host(cluster.fabric, "h1"), *command, "-H", hosts, "--network-interfaces", cluster.interface]
