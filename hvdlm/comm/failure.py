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


class LostRankError(HvdlmError):
    """Another rank has not come, or has gone; which one, a roll call may tell (roll_call.py)."""


@contextmanager
def contact(engine: str, rank: int, *failures: type[Exception]) -> Iterator[None]:
    """Turns what an engine raises when it has lost a rank into a sentence."""
    try:
        yield
    except failures as error:
        reason = str(error).strip().partition("\n")[0]
        sentence = f"rank {rank} has lost contact with another rank: engine {engine} says: {reason}"
        raise LostRankError(sentence) from error


def wait_until(is_done: Callable[[], bool], timeout: float, rank: int, what: str) -> None:
    """Polls until done, with short sleeps that leave the core to whoever computes.

    Raises LostRankError after `timeout` seconds: `rank` has then waited in vain for `what`.
    """
    deadline = time.monotonic() + timeout
    polls = 0
    while not is_done():
        polls += 1
        if polls > _EAGER_POLLS:
            time.sleep(_SLEEP)
            if time.monotonic() > deadline:
                raise waited_in_vain(timeout, rank, what)


def waited_in_vain(timeout: float, rank: int, what: str) -> LostRankError:
    """The error of a rank whose patience has ended."""
    return LostRankError(f"rank {rank} on {socket.gethostname()} waited {timeout:g} s (comm.timeout) for {what}")
