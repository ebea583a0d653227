"""Losses that stand out from those before them."""

from __future__ import annotations

import math
import statistics
from collections import deque

_WINDOW = 50  # losses to compare with
_LEAST = 10  # before the first comparison
_DEVIATIONS = 6.0


class LossSpikes:
    """Compares each loss with the last ones; of a run's beginning, where the loss falls fast, it says nothing wrong."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def add(self, loss: float) -> float | None:
        """Learns of a loss; returns by how many standard deviations it exceeds the mean of the last ones, if it does by
        more than 6.

        A spike is left out of what later losses are compared with.
        """
        if not math.isfinite(loss):
            return None
        if len(self._losses) >= _LEAST:
            deviation = statistics.stdev(self._losses)
            score = (loss - statistics.fmean(self._losses)) / deviation if deviation else 0.0
            if score > _DEVIATIONS:
                return score
        self._losses.append(loss)
        return None
