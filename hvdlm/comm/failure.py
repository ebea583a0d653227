"""How a rank notices that another one has stopped, fallen behind or died."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hvdlm.errors import HvdlmError

# Polls before the first sleep, then the length of a sleep in seconds: ranks that come together lose nothing,
# and one that comes late is noticed within a fraction of what a message of a bucket's size takes.
_EAGER_POLLS = 50
_SLEEP = 200e-6


@contextmanager
def contact(engine: str, rank: int, *failures: type[Exception]) -> Iterator[None]:
    """Turns what an engine raises when it has lost a rank into a sentence."""
    try:
        yield
    except failures as error:
        reason = str(error).strip().partition("\n")[0]
        raise HvdlmError(
            f"rank {rank} has lost contact with another rank, which may have died: engine {engine} says: {reason}"
        ) from error


def wait_until(is_done: Callable[[], bool], timeout: float, rank: int, what: str) -> None:
    """Polls until done, with short sleeps that leave the core to whoever computes.

    Raises HvdlmError after `timeout` seconds: `rank` has then waited in vain for `what`.
    """
    deadline = time.monotonic() + timeout
    polls = 0
    while not is_done():
        polls += 1
        if polls > _EAGER_POLLS:
            time.sleep(_SLEEP)
            if time.monotonic() > deadline:
                raise waited_in_vain(timeout, rank, what)


def waited_in_vain(timeout: float, rank: int, what: str) -> HvdlmError:
    """The error of a rank whose patience has ended."""
    return HvdlmError(
        f"rank {rank} on {socket.gethostname()} waited {timeout:g} s (comm.timeout) for {what}: "
        "look for a rank that has stopped or fallen behind"
    )
