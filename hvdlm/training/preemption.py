"""SIGTERM, SIGUSR1 and Ctrl-C become a request to stop, which the trainer obeys after the current step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

# SIGUSR1 is the one that launchers pass on to their ranks without killing them.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preemption:
    """While entered, `requested` becomes True at the first SIGTERM, SIGINT or SIGUSR1 instead of ending the process.

    If a stop was requested, these signals are ignored after the block: launchers send them again while ranks exit, and
    Python would restore its own handlers on the way out, by which they kill.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Preemption:
        self._previous = {number: signal.signal(number, self._request) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.requested else handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
