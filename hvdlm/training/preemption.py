"""Signals become a request to stop, which the trainer obeys after the current step; a second Ctrl-C ends at once."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence
from types import FrameType, TracebackType

from hvdlm.comm.failure import say
from hvdlm.exit_status import INTERRUPTED

# Launchers pass one Ctrl-C on more than once, to the process and to its group. One that comes later is a person's.
_SECONDS_OF_ONE_INTERRUPT = 1.0


class Preemption:
    """While entered, `requested` becomes True at the first of some signals instead of ending the process.

    A SIGHUP that was ignored at the start, as nohup does, stays ignored. If a stop was requested, these signals are
    ignored after the block: launchers send them again while ranks exit, and Python would restore its own handlers on
    the way out, by which they kill.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """`names`: of the signals."""
        self.requested = False
        self._numbers = [signal.Signals[name] for name in names]
        self._interrupted = math.inf  # since when

    def __enter__(self) -> Preemption:
        ignored = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else []
        numbers = [each for each in self._numbers if each not in ignored]
        self._previous = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def renew(self) -> None:
        """Takes the signals again, once libraries have started that take some of them: Open MPI takes SIGHUP."""
        for number in self._previous:
            signal.signal(number, self._request)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.requested else handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if now - self._interrupted > _SECONDS_OF_ONE_INTERRUPT:
            say("hvdlm: interrupted again: it ends at once, without a checkpoint")
            os._exit(INTERRUPTED)
        self._interrupted = min(self._interrupted, now)
