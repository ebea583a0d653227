"""Waits for messages of Gloo that end after our own timeout, which does not count time in which ranks were suspended.

Gloo's timeouts count it. So each wait gets one that is never reached (that of the group when it was connected is what
a message has otherwise, whatever `set_timeout` said since), and a thread looks after the waits: it ends one by waiting
for the same message with a timeout of a millisecond, after which Gloo closes the connections of the group.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from hvdlm.comm.failure import ENGINE_TIMEOUT, LONGEST_STEP, RunningTime, timeout_error


@dataclass
class _Wait:
    work: dist.Work
    timeout: float
    clock: RunningTime = field(default_factory=RunningTime)
    has_expired: bool = False


class GlooWaits:
    """Waits for messages, each in the thread that calls `wait_for`, watched by one thread more."""

    def __init__(self) -> None:
        self._waits: dict[int, _Wait] = {}  # by thread
        self._watcher: threading.Thread | None = None

    def wait_for(self, work: dist.Work, timeout: float, rank: int, what: str) -> None:
        """Returns when a message has been sent or received. Raises LostRankError if `rank` has waited `timeout` seconds
        for `what`, RuntimeError as Gloo does."""
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="hvdlm-gloo-waits", daemon=True)
            self._watcher.start()
        own = self._waits[threading.get_ident()] = _Wait(work, timeout)
        try:
            work.wait(timedelta(seconds=ENGINE_TIMEOUT))
        except RuntimeError:
            if own.has_expired:
                raise timeout_error(timeout, rank, what) from None
            raise
        finally:
            del self._waits[threading.get_ident()]

    def _watch(self) -> None:
        while True:
            time.sleep(LONGEST_STEP / 4)
            for wait in list(self._waits.values()):
                if wait.clock.seconds() > wait.timeout and not wait.has_expired:
                    wait.has_expired = True
                    with suppress(RuntimeError):
                        wait.work.wait(timedelta(milliseconds=1))
