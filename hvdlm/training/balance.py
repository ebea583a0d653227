"""Ranks that are not equally fast get unequal shares of a batch (`train.balance`).

Each rank measures how long it computes for a token, tells the others now and then, and all deal out sequences by the
same numbers. The samples of a batch, and so the curve, do not depend on who computes which of them.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvdlm.data.loader import Loader
from hvdlm.data.shares import seconds_of
from hvdlm.strategies.strategy import Pace
from hvdlm.timing import StepTimer

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer

_LEAST_GAIN = 0.03  # of a step's time, for which shares change
_ERRORS = 5  # and as many standard errors of the pace that is known least: each is an estimate of a few steps, too
_LONGEST = 4  # measurements whose mean may count: of a rank whose steps are unlike, one says little
_MOST_SHARES = 8  # that are written out in a sentence


class Balance:
    """Measures this rank's pace, and deals out the sequences of a trainer by the paces of all."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        train = trainer.config.train
        self._every = train.balance_every
        # Muon's ranks wait for one another in the middle of an update
        self._waits = {"wait", "optimizer"} if trainer.config.optimizer.algorithm == "muon" else {"wait"}
        self._steps: deque[tuple[StepTimer, int]] = deque(maxlen=self._every)  # each with its sequences on this rank
        self._paces: deque[tuple[Pace, ...]] = deque(maxlen=_LONGEST)  # of all ranks, each time; the last one first
        self._is_news = False  # in the last step they have told them

    def begin(self) -> None:
        """Measures anew from the next step on: ranks, or their shares, have changed."""
        self._steps.clear()
        self._paces.clear()
        self._is_news = False

    def add(self, timer: StepTimer, sequences: int, paces: tuple[Pace, ...]) -> None:
        """A step is done, in which this rank has computed so many sequences and all have told these paces."""
        self._steps.append((timer, sequences))  # read later: on a GPU reading blocks
        self._is_news = bool(paces) and all(pace.picoseconds for pace in paces)
        if self._is_news:
            self._paces.appendleft(paces)

    def pace(self) -> Pace | None:
        """What this rank is to tell in the next step; None if nothing: the same step on all ranks."""
        if self._trainer.step % self._every:
            return None
        length = self._trainer.config.model.context_length
        seconds = [self._compute_seconds(timer) / (count * length) for timer, count in self._steps if count]
        if len(seconds) < self._every - 1:  # since it began anew, with the step after that in which shares changed
            return Pace(0, 0)
        return pace_of(seconds)

    def _compute_seconds(self, timer: StepTimer) -> float:
        return sum(each for name, each in timer.seconds().items() if name not in self._waits)

    def deal_out(self, loader: Loader) -> Loader:
        """Gives ranks other shares of the next batches if that pays: returns what reads this rank's."""
        if not self._is_news:
            return loader
        self._is_news = False
        by_rank = list(zip(*self._paces, strict=True))
        for count in range(1, len(self._paces) + 1):  # of the last one first: a change of speed is soon seen
            if self._share_by([mean_pace(told[:count]) for told in by_rank]):
                loader.close()
                return self._trainer.open_loader()
        return loader

    def _share_by(self, paces: Sequence[Pace]) -> bool:
        """Whether shares by these paces are so much better that ranks have them from the next batch on."""
        trainer, costs = self._trainer, [pace.picoseconds for pace in paces]
        parts = trainer.parts.shared_by(costs, trainer.step)
        old, new = trainer.parts.shares(trainer.step), parts.shares(trainer.step)
        if not any(old):  # by Poisson sampling a batch may be empty
            return False
        gain = 1 - seconds_of(new, costs) / seconds_of(old, costs)
        if gain < max(_LEAST_GAIN, *(_ERRORS * pace.error / pace.picoseconds for pace in paces)):
            return False
        trainer.parts = parts
        self.begin()
        said = f"{self._slowest(costs)}: of a batch ranks have {_listed(new)} sequences from now on, "
        said += f"not {_listed(old)}, for {gain:.0%} less time"
        nanoseconds = [cost / 1000 for cost in costs]
        trainer.write("event", message=said, old_shares=old, shares=new, nanoseconds_a_token=nanoseconds)
        return True

    def _slowest(self, costs: Sequence[int]) -> str:
        slowest = max(range(len(costs)), key=lambda rank: costs[rank])
        ratio = costs[slowest] / statistics.median(cost for rank, cost in enumerate(costs) if rank != slowest)
        where = f"rank {slowest} on {self._trainer.communicator.hosts[slowest]}"
        return f"{where}, the slowest, takes {ratio:.2f} times as long for a token as the others"


def pace_of(seconds: Sequence[float]) -> Pace:
    """The mean of seconds a token, without the least and the greatest tenth: what happens once, such as a collection of
    garbage, does not count, but of a rank that is held up in every other step both kinds do.

    Its standard error is by the deviation of what is left, with each value that is left out replaced by the nearest
    that is not (Tukey & McLaughlin, Sankhya A 25, 1963).
    """
    cut, ordered = math.ceil(len(seconds) / 10), sorted(seconds)
    kept = ordered[cut:-cut]
    deviation = statistics.stdev([kept[0]] * cut + kept + [kept[-1]] * cut)
    error = deviation * math.sqrt(len(seconds)) / len(kept)
    return Pace(max(1, round(statistics.fmean(kept) * 1e12)), round(error * 1e12))


def mean_pace(paces: Sequence[Pace]) -> Pace:
    """Of several measurements of one rank."""
    error = math.hypot(*(pace.error for pace in paces)) / len(paces)
    return Pace(round(statistics.fmean(pace.picoseconds for pace in paces)), round(error))


def _listed(shares: Sequence[int]) -> str:
    if len(shares) > _MOST_SHARES:
        return f"{min(shares)} to {max(shares)}"
    return f"{', '.join(map(str, shares[:-1]))} and {shares[-1]}"
