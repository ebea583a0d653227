"""How a rank notices that another one has stopped, fallen behind or died."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hvdlm.errors import HvdlmError

# Polls before the first sleep: ranks that arrive together lose nothing. Then a sleep is a tenth of the wait so far,
# between these bounds in seconds: a long wait leaves the core to processes that compute, and ends little later.
_POLLS_WITHOUT_SLEEP = 50
_SHORTEST_SLEEP = 200e-6
_LONGEST_SLEEP = 2e-3


class LostRankError(HvdlmError):
    """Another rank has not arrived, or has died; missing_ranks.py may find out which."""


@contextmanager
def lost_rank_errors(engine: str, rank: int, *failures: type[Exception]) -> Iterator[None]:
    """Turns what an engine raises when it has lost a rank into a LostRankError of one sentence."""
    try:
        yield
    except failures as error:
        reason = str(error).strip().partition("\n")[0]
        sentence = f"rank {rank} has lost contact with another rank: engine {engine} says: {reason}"
        raise LostRankError(sentence) from error


def wait_until(is_done: Callable[[], bool], timeout: float, rank: int, what: str) -> None:
    """Polls until `is_done`, with short sleeps that leave the core to processes that compute.

    Raises LostRankError if `rank` has waited `timeout` seconds for `what`.
    """
    begin = time.monotonic()
    polls = 0
    while not is_done():
        polls += 1
        if polls > _POLLS_WITHOUT_SLEEP:
            waited = time.monotonic() - begin
            if waited > timeout:
                raise timeout_error(timeout, rank, what)
            time.sleep(min(max(waited / 10, _SHORTEST_SLEEP), _LONGEST_SLEEP))


def timeout_error(timeout: float, rank: int, what: str) -> LostRankError:
    """The error of a rank whose wait has timed out."""
    return LostRankError(f"rank {rank} on {socket.gethostname()} waited {timeout:g} s (comm.timeout) for {what}")
