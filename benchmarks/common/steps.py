"""Seconds of a training step, and how sure a ratio of them is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

from hvdlm.data.loader import Loader
from hvdlm.training.trainer import Trainer


def step_seconds(trainer: Trainer, loader: Loader, steps: int) -> float:
    """Of a step; the median of some."""
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        trainer.train_step(loader, stop_here=False)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def interval(ratios: Sequence[float]) -> str:
    """The median, and the mean with its 95% interval."""
    half = 1.96 * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    return f"{statistics.median(ratios):.3f} (mean {statistics.fmean(ratios):.3f} ± {half:.3f}, {len(ratios)} pairs)"
