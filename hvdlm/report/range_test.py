"""What a range test says: a run in which the learning rate rises until the loss does (optimizer.schedule)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# Share of a mean that the mean of the next step keeps
_DECAY = 0.9

# A peak rate leaves room below the one at which the loss stops to fall
_MARGIN = 10


def smoothed_losses(records: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Learning rate and exponential moving average of the losses so far, of records of kind train with a finite loss.

    The average is corrected for its beginning at 0 (Kingma & Ba, ICLR 2015, section 3).
    """
    points = []
    mean, weight = 0.0, 0.0
    for record in records:
        if record["loss"] is not None:
            mean = _DECAY * mean + (1 - _DECAY) * record["loss"]
            weight = _DECAY * weight + (1 - _DECAY)
            points.append((record["lr"], mean / weight))
    return points


def advice(records: Sequence[dict[str, Any]]) -> str:
    """A sentence on which peak rate to take: a tenth of that with the least smoothed loss.

    Smith, "Cyclical learning rates for training neural networks" (WACV 2017, arXiv:1506.01186), section 3.3, reads the
    same from where accuracy becomes ragged.
    """
    if any(b["step"] - a["step"] > 1 for a, b in pairwise(records)):
        return "Steps are missing: set log.every = 1."
    points = smoothed_losses(records)
    if not points:
        return "No loss was finite."
    rate, loss = min(points, key=lambda point: point[1])
    if rate == records[-1]["lr"]:
        return f"The loss still falls at {rate:.2g}, the highest rate: raise optimizer.lr."
    return f"The loss is least, {loss:.4f}, at {rate:.2g}: begin with optimizer.lr = {rate / _MARGIN:.1g}."
