"""Mixtures of sources: from which one each sequence of a run is drawn, as a function of their weights only."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from hvdlm.errors import HvdlmError

FINEST = 100_000  # shares are multiples of one part in so many, unless the weights are a ratio of smaller numbers

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WeightedPath:
    """A source as `hvdlm prepare --mix` names it."""

    weight: float
    path: str

    def __str__(self) -> str:
        return f"{str(self.weight).removesuffix('.0')}={self.path}"


class Mixture:
    """An endless succession of sources in which each has its share: of the first n, n times its share, up or down.

    Drawing from a source is a task of unit length whose window is the stretch in which an even succession would have
    it, and the task whose window ends first comes first. That keeps every count of every prefix between the integers
    next to the exact one (Baruah, Cohen, Plaxton & Varvel, "Proportionate progress", Algorithmica 15, 1996; here of
    one processor, whose periodic tasks are the sources). The succession repeats itself, so one period is all that is
    stored, and any place in it is found at once.

    Attributes:
        parts: (S,) int64; the share of source s is parts[s] out of the sum, the length of a period.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights`: one for each source, above 0; only their ratios matter.

        Raises HvdlmError for a weight that is no such number, or less than one part in FINEST of all.
        """
        self.parts = np.array(_parts(weights), dtype=np.int64)
        self._order = np.array(_one_period(self.parts.tolist()), dtype=np.int64)
        # (period,): by source, then in order
        self._places = np.argsort(self._order, kind="stable")
        self._starts = np.cumsum(self.parts) - self.parts  # of each source in `_places`
        self._earlier = np.empty_like(self._order)  # how often its source has come before, in this period
        self._earlier[self._places] = np.arange(len(self._order)) - self._starts[self._order[self._places]]

    @property
    def shares(self) -> list[float]:
        """What the sources have of the whole; they sum to one."""
        return [part / len(self._order) for part in self.parts.tolist()]

    def sources(self, first: int, count: int) -> tuple[Integers, Integers]:
        """The `count` draws from number `first` on: the source of each, and how often it was drawn from before."""
        periods, places = np.divmod(first + np.arange(count), len(self._order))
        sources = self._order[places]
        return sources, periods * self.parts[sources] + self._earlier[places]

    def draws(self, source: int, count: int) -> Integers:
        """The numbers of the first `count` draws from a source: (count,) int64."""
        periods, places = np.divmod(np.arange(count, dtype=np.int64), self.parts[source])
        numbers: Integers = periods * len(self._order) + self._places[self._starts[source] + places]
        return numbers


def _parts(weights: Sequence[float]) -> list[int]:
    """Integers in the ratio of the weights: exact if their sum is at most FINEST, else rounded to that sum."""
    for weight in weights:
        if not math.isfinite(weight) or weight <= 0:
            raise HvdlmError(f"a weight of {weight}: give a number above 0; only the ratios of weights matter")
    exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is seven tenths, not the double next to it
    total = sum(exact)
    for weight, share in zip(weights, (each / total for each in exact), strict=True):
        if share * FINEST < 1:
            raise HvdlmError(f"a weight of {weight} is less than a part in {FINEST:,} of all weights; leave it out")
    whole = [int(each * math.lcm(*(other.denominator for other in exact))) for each in exact]
    parts = [each // math.gcd(*whole) for each in whole]
    return parts if sum(parts) <= FINEST else _rounded([each / total * FINEST for each in exact])


def _rounded(numbers: Sequence[Fraction]) -> list[int]:
    """Integers with the same sum, each next to its number: the largest remainders are rounded up."""
    parts = [math.floor(number) for number in numbers]
    by_remainder = sorted(range(len(parts)), key=lambda index: parts[index] - numbers[index])
    for index in by_remainder[: round(sum(numbers)) - sum(parts)]:
        parts[index] += 1
    return parts


def _one_period(parts: Sequence[int]) -> list[int]:
    """The source of each draw of a period: earliest deadline first, among those that may be drawn already."""
    period = sum(parts)
    released: list[list[tuple[int, int]]] = [[] for _ in range(period)]  # by draw: deadline, source
    for source, part in enumerate(parts):
        for number in range(part):
            released[number * period // part].append((-(-(number + 1) * period // part), source))
    order: list[int] = []
    waiting: list[tuple[int, int]] = []  # a heap
    for tasks in released:
        for task in tasks:
            heapq.heappush(waiting, task)
        order.append(heapq.heappop(waiting)[1])
    return order
