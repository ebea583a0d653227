"""Starting MPI on hosts with several networks: excludes those that connect no hosts, and sets a deadline.

Open MPI assumes that every network of a host reaches every other host. Docker gives its bridge the same address on all
hosts, so a rank that connects to another there connects to itself, and the job hangs or aborts (horovod issues 98,
281).
"""

from __future__ import annotations

import logging
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sysconfig
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hvdlm.comm.failure import LONGEST_STEP, RunningTime
from hvdlm.comm.interfaces import Interface, own_interfaces

if TYPE_CHECKING:
    from hvdlm.comm.mpi import MPICommunicator

logger = logging.getLogger(__name__)

# Bridges that container engines and hypervisors make on each host for guests of that host alone, by the names that
# Docker (docker0, br-0123456789ab), Podman, Kubernetes, LXC, LXD and libvirt give them.
_GUEST_BRIDGE = re.compile(r"docker\d+|br-[0-9a-f]{12}|podman\d+|cni-podman\d+|cni\d+|lxcbr\d+|lxdbr\d+|virbr\d+")

# What Open MPI excludes by default, which a list of ours replaces (ompi_info --param btl tcp --level 1).
_OPEN_MPI_EXCLUDES = "127.0.0.1/8,sppp"

# Seconds within which ranks that have all started must have exchanged their first message.
STARTUP_TIMEOUT = 60.0


def is_guest_bridge(interface: Interface) -> bool:
    """Whether an interface is, by its name, a bridge to containers or virtual machines of this host."""
    return _GUEST_BRIDGE.fullmatch(interface.name) is not None


def exclude_guest_bridges(environment: MutableMapping[str, str]) -> None:
    """Tells Open MPI to exclude this host's guest bridges, unless the user has configured it. Call before MPI_Init."""
    variables = {"OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"}
    bridges = sorted({each.name for each in own_interfaces() if is_guest_bridge(each)})
    if bridges and not variables & environment.keys() and _open_mpi_uses_defaults():
        environment["OMPI_MCA_btl_tcp_if_exclude"] = ",".join([_OPEN_MPI_EXCLUDES, *bridges])


def _open_mpi_uses_defaults() -> bool:
    """Whether no file of parameters includes or excludes interfaces: Open MPI refuses to be told both."""
    ompi_info = shutil.which("ompi_info") or shutil.which("ompi_info", path=sysconfig.get_path("scripts"))
    if ompi_info is None:
        return False
    words = [ompi_info, "--param", "btl", "tcp", "--level", "9", "--parsable"]
    lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    sources = [line for line in lines if re.search(r":btl_tcp_if_(include|exclude):source:", line)]
    return bool(sources) and all(line.endswith(":default") for line in sources)


def start_mpi(rank: int, timeout: float) -> MPICommunicator:
    """Starts MPI and joins its ranks; `timeout`: seconds that a rank waits for another."""
    # Importing mpi4py calls MPI_Init, which returns when all ranks have called it and holds the GIL until then:
    # a deadline that has passed, or a signal, is acted on only afterwards.
    with startup_deadline(rank, timeout):
        from hvdlm.comm.mpi import MPICommunicator
    with startup_deadline(rank, min(timeout, STARTUP_TIMEOUT)):
        return MPICommunicator(timeout)


@contextmanager
def startup_deadline(rank: int, seconds: float) -> Iterator[None]:
    """Ends the process with an error message unless the block ends within `seconds`. For the main thread.

    A call that hangs inside MPI can be left only by ending the process, without MPI's exit handlers, which would wait
    for the same ranks again. Where Open MPI aborts one rank during start-up, mpirun ends the others by SIGTERM: they
    print the advice that the aborted rank could not.
    """
    # A Python signal handler runs only after the library call has returned; the wake-up descriptor is written at once.
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        clock = RunningTime()
        while clock.seconds() <= seconds:
            if not select.select([reader], [], [], min(seconds, LONGEST_STEP / 2))[0]:
                continue
            number = reader.recv(1)[0]
            if number == signal.SIGTERM:
                logger.error(
                    "%s", _failure_message(rank, "was ended before it had reached the others", own_interfaces())
                )
                os._exit(128 + number)
            if number == 0:
                return
        logger.error("%s", _failure_message(rank, f"has not reached the others within {seconds:g} s", own_interfaces()))
        os._exit(1)

    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        writer.send(b"\0")
        watcher.join()
        reader.close()
        writer.close()


def _failure_message(rank: int, what: str, interfaces: Sequence[Interface]) -> str:
    """The error message of a rank that has reached no other: it knows its own networks, not those of other hosts."""
    sentence = f"rank {rank} on {socket.gethostname()} {what}"
    networks = {str(each.address.network): each.name for each in interfaces if not is_guest_bridge(each)}
    if len(networks) < 2:
        return (
            f"{sentence}: look for a firewall between the hosts or a host that is down; "
            "`hvdlm doctor --hostfile FILE` tries them all"
        )
    named = " and ".join(f"{network} ({name})" for network, name in networks.items())
    examples = " or ".join(networks)
    return (
        f"{sentence}: this host is on {named}, and one of these may not lead to the other hosts: name the right one, "
        f"mpirun --mca btl_tcp_if_include {examples}, or horovodrun --network-interfaces "
        f"{' or '.join(networks.values())}; `hvdlm doctor --hostfile FILE` finds it"
    )
