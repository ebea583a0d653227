"""How many sequences each global batch has, and how many have come before it, where it grows at first."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of global batches, numbered from 0: a ramp of equal increments, then always `final`.

    Increment i of n, from 1, comes with batch ceil(i steps / n): each size before the final one lasts for as many
    batches as the others, up or down.
    """

    final: int
    """Sequences of a global batch after the ramp."""
    increment: int = 0
    """Sequences by which it grows at a time."""
    increments: int = 0
    """How often, at most `steps` times; 0: it does not grow."""
    steps: int = 1
    """Batches of the ramp, above 0."""

    @property
    def first(self) -> int:
        """Sequences of batch 0."""
        return self.final - self.increments * self.increment

    @property
    def divisor(self) -> int:
        """The greatest common divisor of all sizes."""
        return math.gcd(self.final, self.increment if self.increments else 0)

    def size(self, batch: int) -> int:
        """Sequences of a global batch."""
        grown = min(self.increments, batch * self.increments // self.steps)
        return self.first + grown * self.increment

    def before(self, batch: int) -> int:
        """Sequences of all global batches before this one."""
        numbers = range(1, self.increments + 1)
        batches_since = (max(0, batch - -(-number * self.steps // self.increments)) for number in numbers)
        return batch * self.first + self.increment * sum(batches_since)
