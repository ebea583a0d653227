"""Codec `auto`: measures what each codec costs here and how the backward pass goes, and chooses for every bucket.

In the first steps gradients are sent after the backward pass, so that nothing disturbs it while it is timed. Then each
codec is tried on real buckets. The choice with which gradients should arrive soonest (forecast.py), and every codec by
itself, in buckets of the size that suits it, that is not far behind, then run a race of a few steps each: what they do
to the backward pass, to each other and to the cores shows only there. The winner stays, and is watched; where its steps
and its race part, because a link has changed, all is measured anew.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.gradients.codec_trial import threads_take_turns
from hvdlm.gradients.forecast import WORTHWHILE, BackwardPass, Cost, arrival, choose
from hvdlm.gradients.moment import Moment

logger = logging.getLogger(__name__)

# Steps: the first of a run compile and allocate; then the backward pass is timed; then each choice of a race, the first
# of whose steps does not count; then the winner.
_WARM_UP = 2
_TIMED = 3
_RACED = 3
_WATCHED = 10

# Share of the outcome by which the winner's race may have been wrong.
_TOLERANCE = 0.1

# Share by which forecasts may be wrong: by how much later than the soonest a codec may be forecast and still race.
_DOUBT = 0.5

Try = Callable[[int, str], Cost]


Cut = Callable[[int], list[int]]


@dataclass(frozen=True)
class Plan:
    """How gradients are to travel: in buckets of about so many bytes, each by the codec of that name."""

    bucket_bytes: int
    names: list[str]

    def __str__(self) -> str:
        counts = Counter(self.names)
        return " and ".join(f"{name} for {count}" if len(counts) > 1 else name for name, count in counts.items())


@dataclass
class _Contender:
    """A plan; seconds from the beginning of the backward pass until all gradients are there."""

    plan: Plan
    forecast: float
    outcome: float = 0.0


class Chooser:
    """What all ranks agree to do, which is `plan`, to be followed from the beginning of the next step on.

    Told of every step by GradientSync; all ranks call everything in the same order.
    """

    def __init__(
        self,
        communicator: Communicator,
        device: torch.device,
        bucket_bytes: int,
        candidates: Mapping[str, int],
        cut: Cut,
    ) -> None:
        """`bucket_bytes`: of buckets whose codecs differ, and in which all is measured; `candidates`: bytes of the
        buckets that suit a codec, by name, those first that lose less; `cut`: elements of each bucket of such bytes.
        """
        self._communicator, self._device = communicator, device
        self._bucket_bytes, self._candidates, self._cut = bucket_bytes, candidates, cut
        self.plan = self._all_by(next(iter(candidates)))
        self._measures = communicator.size > 1
        self._seen = -_WARM_UP  # steps of what is measured or watched now
        self._watched = _WATCHED
        self._expected = 0.0  # of the winner
        self._race: list[_Contender] = []  # begun and not ended if not empty
        self._running = 0  # which of them
        self._durations: list[float] = []
        self._fills: list[list[float]] = []
        self._full: list[Moment] = []

    @property
    def holds_back(self) -> bool:
        """Whether no bucket is to be sent before the backward pass ends."""
        return self._measures

    def begin(self) -> None:
        """The backward pass begins."""
        self._began, self._full = Moment(self._device), []

    def full(self) -> None:
        """The next bucket, in their order, is full."""
        if self._measures:
            self._full.append(Moment(self._device))

    def backward_ended(self) -> None:
        if self._measures:
            self._record(Moment(self._device))

    def arrived(self, try_: Try) -> None:
        """All gradients are there. May be the moment to measure: `try_` says what a bucket costs by a codec."""
        if self._communicator.size == 1:
            return
        if not self._measures:
            self._record(Moment(self._device))
        self._seen += 1
        if self._measures and self._seen == _TIMED:
            self._choose(try_)
        elif self._race and self._seen == _RACED:
            self._finish_one()
        elif not self._measures and not self._race and self._seen == self._watched:
            self._compare()

    def state_dict(self, followed: Plan) -> dict[str, Any]:
        """`followed`: the plan of the last step, by which codecs owe what they owe."""
        is_settled = not self._measures and not self._race and followed == self.plan
        return {**asdict(followed), "expected": self._expected, "measures": not is_settled}

    def load_state_dict(self, state: Mapping[str, Any], same_ranks: bool) -> None:
        """Goes on with a choice, on as many ranks and with the same buckets and candidates; else measures anew."""
        if "bucket_bytes" not in state:  # of an earlier hvdlm
            return
        plan = Plan(state["bucket_bytes"], state["names"])
        is_known = plan.bucket_bytes in (self._bucket_bytes, *self._candidates.values())
        is_known &= set(plan.names) <= self._candidates.keys()
        if same_ranks and is_known and len(plan.names) == len(self._cut(plan.bucket_bytes)):
            self.plan, self._expected, self._measures = plan, state["expected"], state["measures"]
            if self._measures:
                self._measure_anew()

    def _record(self, end: Moment) -> None:
        if self._seen >= 0:
            self._durations.append(end - self._began)
            if self._measures:
                self._fills.append([full - self._began for full in self._full])

    def _choose(self, try_: Try) -> None:
        backward = self._backward_pass()
        elements = self._cut(self._bucket_bytes)
        costs = {name: self._cost_by_size(try_, name, elements) for name in self._candidates}
        shares_core = self._device.type == "cpu" and threads_take_turns(self._communicator)
        names = choose(backward, {name: [cost(each) for each in elements] for name, cost in costs.items()}, shares_core)
        mixed = Plan(self._bucket_bytes, names)
        plans = [*([mixed] if len(set(names)) > 1 else []), *map(self._suiting, self._candidates)]

        def forecast(plan: Plan) -> float:
            sizes = self._cut(plan.bucket_bytes)
            # when the numbers are there that lie in a bucket, and all before them
            full = np.interp(np.cumsum(sizes), np.cumsum(elements), backward.full).tolist()
            there = [costs[name](size) for name, size in zip(plan.names, sizes, strict=True)]
            return arrival(BackwardPass(full, backward.end), there, shares_core)

        contenders = [_Contender(plan, forecast(plan)) for plan in plans]
        latest = (1 + _DOUBT) * min(each.forecast for each in contenders)
        self._race = [each for each in contenders if each.forecast <= latest]
        told = ", ".join(f"{each.plan} {_milliseconds(each.forecast)}" for each in contenders)
        self._tell(f"the backward pass takes {_milliseconds(backward.end)}; gradients should be there after: {told}")
        self._measures = False
        self._start(0)

    def _start(self, contender: int) -> None:
        self._running = contender
        self.plan = self._race[contender].plan
        self._turn(measures=False)
        self._seen = -1

    def _finish_one(self) -> None:
        self._race[self._running].outcome = self._slowest_median()
        if self._running + 1 < len(self._race):
            self._start(self._running + 1)
            return
        soonest = min(self._race, key=lambda each: each.outcome)
        # Of those that are next to nothing behind, the one that loses least: a mixture of codecs counts as the soonest
        near = [each for each in self._race if each.outcome * (1 - WORTHWHILE) <= soonest.outcome]
        alone = [each for name in self._candidates for each in near if set(each.plan.names) == {name}]
        winner = alone[0] if alone else soonest
        told = ", ".join(f"{each.plan} {_milliseconds(each.outcome)}" for each in self._race)
        self._tell(f"gradients were there after: {told}; so {winner.plan}")
        self.plan, self._expected, self._race = winner.plan, winner.outcome, []
        self._turn(measures=False)
        self._seen = -1

    def _compare(self) -> None:
        outcome = self._slowest_median()
        parted = abs(outcome - self._expected) > _TOLERANCE * outcome
        self._tell(
            f"gradients are there after {_milliseconds(outcome)}, {_milliseconds(self._expected)} were expected"
            f"{': measuring anew' if parted else ''}"
        )
        self._watched *= 2  # what is well known is looked at more and more seldom
        self._turn(measures=parted)
        if parted:
            self._measure_anew()

    def _slowest_median(self) -> float:
        return max(self._communicator.all_gather_object(statistics.median(self._durations)))

    def _measure_anew(self) -> None:
        """In the buckets for that, by a codec that is in use."""
        if self.plan.bucket_bytes != self._bucket_bytes:
            self.plan = self._all_by(self.plan.names[0])

    def _all_by(self, name: str) -> Plan:
        return Plan(self._bucket_bytes, [name] * len(self._cut(self._bucket_bytes)))

    def _suiting(self, name: str) -> Plan:
        """All by one codec, in buckets of the size for it."""
        nbytes = self._candidates[name]
        return Plan(nbytes, [name] * len(self._cut(nbytes)))

    def _turn(self, measures: bool) -> None:
        self._measures, self._seen = measures, 0
        self._durations, self._fills = [], []

    def _backward_pass(self) -> BackwardPass:
        """The median of the steps timed, of the slowest rank."""
        own = [statistics.median(times) for times in zip(*self._fills, strict=True)]
        own.append(statistics.median(self._durations))
        slowest = [max(times) for times in zip(*self._communicator.all_gather_object(own), strict=True)]
        return BackwardPass(slowest[:-1], slowest[-1])

    def _cost_by_size(self, try_: Try, name: str, elements: Sequence[int]) -> Callable[[int], Cost]:
        """What a bucket of so many elements costs, from trials of the smallest and the largest."""
        least, most = min(elements), max(elements)
        large = try_(elements.index(most), name)
        small = try_(elements.index(least), name) if most > least else Cost(0.0, 0.0)
        least = least if most > least else 0

        def cost(size: int) -> Cost:
            share = (size - least) / (most - least)
            return Cost(*(max(0.0, low + share * (high - low)) for low, high in zip(small, large, strict=True)))

        return cost

    def _tell(self, sentence: str) -> None:
        if self._communicator.rank == 0:
            logger.info("codec auto: %s", sentence)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
