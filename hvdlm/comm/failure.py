"""How a rank notices that another one has stopped, fallen behind or died."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hvdlm.errors import HvdlmError

# Polls before the first sleep: ranks that come together lose nothing. Then a sleep is a tenth of the wait until then,
# between these bounds in seconds: who waits long leaves the core to whoever computes, and loses little more.
_EAGER_POLLS = 50
_SHORTEST_SLEEP = 200e-6
_LONGEST_SLEEP = 2e-3


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
    begin = time.monotonic()
    polls = 0
    while not is_done():
        polls += 1
        if polls > _EAGER_POLLS:
            waited = time.monotonic() - begin
            if waited > timeout:
                raise waited_in_vain(timeout, rank, what)
            time.sleep(min(max(waited / 10, _SHORTEST_SLEEP), _LONGEST_SLEEP))


def waited_in_vain(timeout: float, rank: int, what: str) -> LostRankError:
    """The error of a rank whose patience has ended."""
    return LostRankError(f"rank {rank} on {socket.gethostname()} waited {timeout:g} s (comm.timeout) for {what}")
