"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C become a request to stop, which the trainer obeys after the current step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

# SIGUSR1 is the one that launchers pass on to their ranks without killing them; SIGHUP comes when a terminal is closed.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Preemption:
    """While entered, `requested` becomes True at the first of these signals instead of ending the process.

    A SIGHUP that was ignored at the start, as nohup does, stays ignored. If a stop was requested, these signals are
    ignored after the block: launchers send them again while ranks exit, and Python would restore its own handlers on
    the way out, by which they kill.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Preemption:
        numbers = [each for each in _SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.requested else handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
