"""A rank that computes more slowly than the others, which wait for it in every step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_RATIO = 1.5  # over the median of the others
_TIMES = 3  # in a row before it is told
_LEAST_SECONDS = 2e-3  # more in a step: what is less nobody notices


class Stragglers:
    """Compares what ranks have computed from one line of metrics to the next."""

    def __init__(self) -> None:
        self._rank: int | None = None  # the slowest, if it is that slow
        self._times = 0  # in a row

    def add(self, seconds: Sequence[float]) -> tuple[int, float] | None:
        """Learns of the seconds that each rank has computed in a step.

        Returns a rank, and how many times as long it computes as the median of the others, when it has done so for the
        third time in a row.
        """
        if len(seconds) < 2:
            return None
        slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
        median = statistics.median(each for rank, each in enumerate(seconds) if rank != slowest)
        is_slow = seconds[slowest] > max(_RATIO * median, median + _LEAST_SECONDS)
        rank = slowest if is_slow else None
        self._times = self._times + 1 if rank == self._rank else 1
        self._rank = rank
        return (slowest, seconds[slowest] / median) if is_slow and self._times == _TIMES and median else None
