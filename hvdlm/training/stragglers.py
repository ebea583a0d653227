"""A rank that computes more slowly than the others, which wait for it in every step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_RATIO = 1.5  # over the median of the others
_TIMES = 3  # in a row before it is told
_LEAST_SECONDS = 1.0  # of the slowest rank: in less, what else a host's cores do makes as much difference


class Stragglers:
    """Compares for how long ranks have computed, each time that one has for a second or more."""

    def __init__(self) -> None:
        self._seconds: list[float] = []  # of each rank since the last comparison
        self._rank: int | None = None  # the slowest, if it is that slow
        self._times = 0  # in a row

    def add(self, seconds: Sequence[float]) -> tuple[int, float] | None:
        """Learns for how long each rank has computed since the last call.

        Returns a rank, and how many times as long it computes as the median of the others, when it has done so for the
        third time in a row. If the number of ranks has changed, begins anew.
        """
        if len(seconds) < 2:
            return None
        if len(self._seconds) != len(seconds):
            self._seconds, self._times = [0.0] * len(seconds), 0
        seconds = self._seconds = [before + more for before, more in zip(self._seconds, seconds, strict=True)]
        if max(seconds) < _LEAST_SECONDS:
            return None
        self._seconds = [0.0] * len(seconds)
        slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
        median = statistics.median(each for rank, each in enumerate(seconds) if rank != slowest)
        is_slow = seconds[slowest] > _RATIO * median
        rank = slowest if is_slow else None
        self._times = self._times + 1 if rank == self._rank else 1
        self._rank = rank
        return (slowest, seconds[slowest] / median) if is_slow and self._times == _TIMES and median else None
