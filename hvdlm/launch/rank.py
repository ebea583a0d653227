"""One rank that another process starts: what it is told of the others, and how it ends."""

from __future__ import annotations

import collections
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1  # prctl(2)
_LINES = 20  # of what a rank has said last

_C = ctypes.CDLL(None)  # loaded now: after a fork the loader may be locked for ever


class Place(NamedTuple):
    """Where a rank is."""

    node: str  # equal for ranks on one host
    address: str  # by which other hosts reach it
    port: int  # free there, a moment ago


class Outcome(NamedTuple):
    """How a rank has ended."""

    end: float  # seconds since the epoch, by its host's clock
    status: int  # below 0: minus the signal
    last: str  # what it has said last


def own_place(node: str | None = None, address: str | None = None) -> Place:
    """Of this process."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    host = socket.gethostname()
    return Place(node or host, address or socket.gethostbyname(host), port)


def environment_of(rank: int, places: Sequence[Place]) -> dict[str, str]:
    """The variables by which torchrun tells a rank of the others."""
    nodes = list(dict.fromkeys(place.node for place in places))
    node = places[rank].node
    on_node = [other for other, place in enumerate(places) if place.node == node]
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(places)),
        "LOCAL_RANK": str(on_node.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(on_node)),
        "GROUP_RANK": str(nodes.index(node)),
        "MASTER_ADDR": places[0].address,
        "MASTER_PORT": str(places[0].port),
        "TORCHELASTIC_RUN_ID": "hvdlm",  # that these count, and not those of a batch system around the cluster
    }


def run_rank(settings: str, environment: dict[str, str]) -> Outcome:
    """Trains with settings, as TOML, from the newest checkpoint on, in a process that ends with this one.

    What it says is printed here.
    """
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "config.toml"
        config.write_text(settings, encoding="utf-8")
        words = [sys.executable, "-m", "hvdlm", "train", str(config), "--resume", "latest"]
        parent = os.getpid()

        def end_with_parent() -> None:
            _C.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it has ended before that was heard
                os._exit(1)

        process = subprocess.Popen(
            words,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=end_with_parent,
        )
        assert process.stdout is not None
        last = collections.deque[str](maxlen=_LINES)
        with process.stdout:
            for line in process.stdout:
                print(line, end="", flush=True)
                last.append(line)
        status = process.wait()
        return Outcome(time.time(), status, "".join(last))
