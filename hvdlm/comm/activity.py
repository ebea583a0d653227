"""What a rank is doing: for a watchdog in its own process, and for ranks that wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from hvdlm.comm.failure import RunningTime

_WAITS = "waits "

# Over what a rank may do without a sign of life. One that waits for another gives up by itself, and can say more.
_PATIENCE_OF_ONE_THAT_WAITS = 2.0

_SECONDS_BETWEEN_LOOKS = 0.25


class _Doing(NamedTuple):
    number: int  # counts what a rank has begun
    what: str  # "" if that may take any time
    patience: float


class Activity:
    """What this process has begun last. It is set by the thread that works, and read by others."""

    def __init__(self) -> None:
        self.now = _Doing(0, "", 1.0)

    def begin(self, what: str, patience: float = 1.0) -> None:
        """`what`: a phrase with a verb, such as "reads batch 7"; `patience`: over what else may take."""
        self.now = _Doing(self.now.number + 1, what, patience)

    def begin_wait(self, what: str) -> None:
        """This rank needs something of others."""
        self.begin(f"{_WAITS}for {what}", _PATIENCE_OF_ONE_THAT_WAITS)

    def idle(self) -> None:
        """What follows may take any time."""
        self.begin("")

    @contextmanager
    def within(self, what: str, patience: float) -> Iterator[None]:
        """`what` happens in the middle of something else, which begins anew afterwards."""
        before = self.now
        self.begin(what, patience)
        try:
            yield
        finally:
            self.begin(before.what, before.patience)


def is_waiting(doing: str) -> bool:
    """Whether what `Watchdog.doing` has said of a rank is that it waits for others."""
    return doing.startswith(_WAITS)


class Watchdog:
    """A thread that notices when what this rank is doing takes too long.

    Seconds in which the process was suspended do not count.
    """

    def __init__(self, activity: Activity, timeout: float, on_stuck: Callable[[str], None]) -> None:
        """`on_stuck`: called once with what has taken longer than `timeout` seconds times its patience."""
        self._activity, self._timeout, self._on_stuck = activity, timeout, on_stuck
        self._is_closed = threading.Event()
        self._doing, self._seconds = "", 0.0
        threading.Thread(target=self._watch, name="hvdlm-watchdog", daemon=True).start()

    def doing(self) -> str:
        """What this rank is doing, and for how long; empty if nobody need know."""
        return f"{self._doing}, for {self._seconds:.0f} s" if self._doing else ""

    def close(self) -> None:
        self._is_closed.set()

    def _watch(self) -> None:
        number, clock = -1, RunningTime()
        while not self._is_closed.wait(_SECONDS_BETWEEN_LOOKS):
            now = self._activity.now
            if now.number != number:
                number, clock = now.number, RunningTime()
            self._doing, self._seconds = now.what, clock.seconds()
            if now.what and self._seconds > self._timeout * now.patience:
                self._on_stuck(self.doing())
                return
