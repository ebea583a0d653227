"""Blocks of training steps in turns: how long a step takes, and how sure a ratio is."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence

from common.script import absolute_path
from hvdlm.data.loader import Loader
from hvdlm.training.trainer import Trainer


def parse_blocks(description: str | None, blocks: int) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and settings in it, of a script that trains blocks of steps in turns, `blocks` by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=absolute_path)
    parser.add_argument("--steps", type=int, default=2, help="of a block (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=blocks, help="of each kind (default: %(default)s)")
    return parser.parse_known_args()


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
