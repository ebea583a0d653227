"""The first messages of a job over MPI, on hosts with several networks: keeping off those that join nobody, and an end.

Open MPI takes every network of a host for a way to every other host. Docker gives its bridge the same address on all
hosts, so a rank that calls another one there calls itself, and the job hangs or is aborted (horovod issues 98, 281).
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

from hvdlm.comm.interfaces import Interface, own_interfaces

if TYPE_CHECKING:
    from hvdlm.comm.mpi import MPICommunicator

logger = logging.getLogger(__name__)

# Bridges that container engines and hypervisors make on each host for guests of that host alone, by the names that
# Docker (docker0, br-0123456789ab), Podman, Kubernetes, LXC, LXD and libvirt give them.
_GUESTS_ONLY = re.compile(r"docker\d+|br-[0-9a-f]{12}|podman\d+|cni-podman\d+|cni\d+|lxcbr\d+|lxdbr\d+|virbr\d+")

# What Open MPI keeps off by itself, which naming more would replace (ompi_info --param btl tcp --level 1).
_OPEN_MPI_EXCLUDES = "127.0.0.1/8,sppp"

# Seconds between ranks that have all started, and their first word to each other, before something is wrong.
PATIENCE = 60.0


def for_guests_only(interface: Interface) -> bool:
    """Whether an interface is, by its name, a bridge to containers or virtual machines of this host."""
    return _GUESTS_ONLY.fullmatch(interface.name) is not None


def keep_open_mpi_off_bridges(environment: MutableMapping[str, str]) -> None:
    """Excludes this host's bridges for guests, unless the user has told Open MPI what to use. Before MPI_Init."""
    variables = {"OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"}
    bridges = sorted({each.name for each in own_interfaces() if for_guests_only(each)})
    if bridges and not variables & environment.keys() and _open_mpi_decides_alone():
        environment["OMPI_MCA_btl_tcp_if_exclude"] = ",".join([_OPEN_MPI_EXCLUDES, *bridges])


def _open_mpi_decides_alone() -> bool:
    """Whether no file of parameters includes or excludes interfaces: Open MPI refuses to be told both."""
    ompi_info = shutil.which("ompi_info") or shutil.which("ompi_info", path=sysconfig.get_path("scripts"))
    if ompi_info is None:
        return False
    words = [ompi_info, "--param", "btl", "tcp", "--level", "9", "--parsable"]
    lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    sources = [line for line in lines if re.search(r":btl_tcp_if_(include|exclude):source:", line)]
    return bool(sources) and all(line.endswith(":default") for line in sources)


def meet_over_mpi(rank: int, timeout: float) -> MPICommunicator:
    """Starts MPI and joins its ranks; `timeout`: seconds that a rank waits for another."""
    # MPI_Init returns when all have come, and holds Python's lock till then: what was noted meanwhile is read after it.
    with first_contact(rank, timeout):
        from hvdlm.comm.mpi import MPICommunicator
    with first_contact(rank, min(timeout, PATIENCE)):
        return MPICommunicator(timeout)


@contextmanager
def first_contact(rank: int, seconds: float) -> Iterator[None]:
    """Ends the process, after a sentence, unless the block ends within `seconds`. For the main thread.

    What hangs there is inside a library that nothing but the end of the process gets out of, and whose functions at
    exit would wait for the same ranks again. Where Open MPI aborts one rank in there, mpirun ends the others by
    SIGTERM: they say what the aborted one could not.
    """
    # A handler in Python runs only after the library has returned; what the interpreter writes here is read at once.
    watched, noted = socket.socketpair()
    noted.setblocking(False)

    def watch() -> None:
        while select.select([watched], [], [], seconds)[0]:
            number = watched.recv(1)[0]
            if number == signal.SIGTERM:
                logger.error("%s", _in_vain(rank, "was ended before it had reached the others", own_interfaces()))
                os._exit(128 + number)
            if number == 0:
                return
        logger.error("%s", _in_vain(rank, f"has not reached the others within {seconds:g} s", own_interfaces()))
        os._exit(1)

    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(noted.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        noted.send(b"\0")
        watcher.join()
        watched.close()
        noted.close()


def _in_vain(rank: int, what: str, interfaces: Sequence[Interface]) -> str:
    """What a rank can say that has reached nobody: it knows its own networks, and not which of them the others have."""
    sentence = f"rank {rank} on {socket.gethostname()} {what}"
    networks = {str(each.address.network): each.name for each in interfaces if not for_guests_only(each)}
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
