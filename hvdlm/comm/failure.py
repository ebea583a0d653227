"""How a rank notices that another one has stopped, fallen behind or died."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeout  # the built-in one from Python 3.11 on
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

from hvdlm.errors import HvdlmError

T = TypeVar("T")

# For a sentence to be printed, where whoever reads it does not
_SECONDS_TO_PRINT = 2.0

# Polls before the first sleep: ranks that arrive together lose nothing. Then a sleep is a tenth of the wait so far,
# between these bounds in seconds: a long wait leaves the core to processes that compute, and ends little later.
_POLLS_WITHOUT_SLEEP = 50
_SHORTEST_SLEEP = 200e-6
_LONGEST_SLEEP = 2e-3

# Seconds after which an engine's own timeout ends a wait that none of ours has ended: a month. Engines count time in
# which the process was suspended, too.
ENGINE_TIMEOUT = 30 * 24 * 3600

# Seconds between two looks at the clock that count at most: what is beyond, this process has not been running.
LONGEST_STEP = 1.0


class RunningTime:
    """The seconds that this process has waited, without those in which it was suspended itself.

    A scheduler that suspends a job suspends all of its ranks: when they go on, each has been waiting as long as before.
    To be looked at several times in each `LONGEST_STEP`.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._seconds = 0.0

    def seconds(self) -> float:
        """Seconds since the beginning, as far as the process was running."""
        now = time.monotonic()
        self._seconds += min(now - self._last, LONGEST_STEP)
        self._last = now
        return self._seconds


class LostRankError(HvdlmError):
    """Another rank has not arrived, or has died; missing_ranks.py may find out which."""


class DeadRankError(LostRankError):
    """The engine has noticed that another rank has died, or another rank has: the others can go on without it."""


class LeftOutError(HvdlmError):
    """The launcher has taken this rank out of the job; others go on. It is to end by itself."""


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

    Raises LostRankError if `rank` has waited `timeout` seconds for `what`, those not counted in which it was suspended.
    """
    clock = RunningTime()
    polls = 0
    while not is_done():
        polls += 1
        if polls > _POLLS_WITHOUT_SLEEP:
            waited = clock.seconds()
            if waited > timeout:
                raise timeout_error(timeout, rank, what)
            time.sleep(min(max(waited / 10, _SHORTEST_SLEEP), _LONGEST_SLEEP))


def result_within(future: Future[T], timeout: float, rank: int, what: str) -> T:
    """The result of a future, or its exception; LostRankError after `timeout` seconds, as `wait_until` counts them."""
    clock = RunningTime()
    while True:
        with suppress(WaitTimeout):
            return future.result(min(timeout, LONGEST_STEP / 2))
        if future.done():
            return future.result()  # it has ended just now, or raises such an exception itself
        if clock.seconds() > timeout:
            raise timeout_error(timeout, rank, what)


def timeout_error(timeout: float, rank: int, what: str) -> LostRankError:
    """The error of a rank whose wait has timed out."""
    return LostRankError(f"rank {rank} on {socket.gethostname()} waited {timeout:g} s (comm.timeout) for {what}")


def end_process(reason: str) -> NoReturn:
    """Prints `reason` to stderr, if somebody still reads that, and ends this process with status 1."""
    say(reason)
    os._exit(1)


def say(reason: str) -> None:
    """Prints `reason` to stderr, unless it is empty; a stderr that is closed, full or not read keeps no rank alive."""

    def write() -> None:
        with suppress(OSError, ValueError):
            print(reason, file=sys.stderr, flush=True)

    if reason:
        try_for(_SECONDS_TO_PRINT, write)


def try_for(seconds: float, action: Callable[[], object]) -> None:
    """Runs `action` on a thread, and leaves it to itself if it takes longer than `seconds`."""
    thread = threading.Thread(target=action, name="hvdlm-last-words", daemon=True)
    thread.start()
    thread.join(seconds)
