"""Codec `auto`: measures what each codec costs here and how the backward pass goes, and chooses for every bucket.

In the first steps gradients are sent after the backward pass, so that nothing disturbs it while it is timed. Then each
codec is tried on real buckets, and the choice with which gradients should arrive soonest (forecast.py) is kept, and
watched. Where forecast and outcome part, because a link has changed or codecs get in each other's way, all is measured
anew, and what the chosen codecs cost more or less than their trial said is known from then on.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.gradients.codec_trial import threads_take_turns
from hvdlm.gradients.codecs.switching import Switching
from hvdlm.gradients.forecast import BackwardPass, Cost, arrival, choose
from hvdlm.gradients.moment import Moment

logger = logging.getLogger(__name__)

# Steps: the first of a run compile and allocate; then the backward pass is timed; then the outcome is.
_WARM_UP = 2
_TIMED = 3
_WATCHED = 10

# Share of the outcome by which a forecast may be wrong.
_TOLERANCE = 0.1

# A codec's trial is thought to be wrong by no more than this factor.
_MOST_WRONG = 16.0

Try = Callable[[int, str], Cost]


class Chooser:
    """What all ranks agree to do. Told of every step by GradientSync; all ranks call everything in the same order."""

    def __init__(
        self, communicator: Communicator, device: torch.device, codecs: Sequence[Switching], candidates: Sequence[str]
    ) -> None:
        """`codecs`: of the buckets; `candidates`: names of codecs, those first that lose less."""
        self._communicator, self._device = communicator, device
        self._codecs, self._candidates = codecs, candidates
        self._measures = communicator.size > 1
        self._seen = -_WARM_UP  # steps of what is measured or watched now
        self._watched = _WATCHED
        self._forecast = 0.0
        self._corrections = dict.fromkeys(candidates, 1.0)
        self._outcome: float | None = None  # of a choice whose forecast was wrong
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
        elif not self._measures and self._seen == self._watched:
            self._compare()

    def state_dict(self) -> dict[str, Any]:
        codecs = [codec.name for codec in self._codecs]
        return {"codecs": codecs, "forecast": self._forecast, "measures": self._measures}

    def load_state_dict(self, state: Mapping[str, Any], same_ranks: bool) -> None:
        """Goes on with a choice, on as many ranks and with the same buckets and candidates; else measures anew."""
        names = state["codecs"]
        if same_ranks and len(names) == len(self._codecs) and set(names) <= set(self._candidates):
            for codec, name in zip(self._codecs, names, strict=True):
                codec.become(name)
            self._forecast, self._measures = state["forecast"], state["measures"]

    def _record(self, end: Moment) -> None:
        if self._seen >= 0:
            self._durations.append(end - self._began)
            if self._measures:
                self._fills.append([full - self._began for full in self._full])

    def _choose(self, try_: Try) -> None:
        backward = self._backward_pass()
        trials = {name: self._try_sizes(try_, name) for name in self._candidates}
        shares_core = self._device.type == "cpu" and threads_take_turns(self._communicator)
        if self._outcome is not None:
            self._correct(backward, trials, shares_core)
        costs = {name: _scaled(each, self._corrections[name]) for name, each in trials.items()}
        names = choose(backward, costs, shares_core)
        for codec, name in zip(self._codecs, names, strict=True):
            codec.become(name)
        dense = arrival(backward, costs[self._candidates[0]], shares_core)
        chosen = [costs[name][index] for index, name in enumerate(names)]
        self._forecast = arrival(backward, chosen, shares_core)
        self._tell(
            f"{_counted(names)}; the backward pass takes {_milliseconds(backward.end)}, gradients should be there "
            f"after {_milliseconds(self._forecast)}, by {self._candidates[0]} alone after {_milliseconds(dense)}"
        )
        self._turn(measures=False)

    def _compare(self) -> None:
        outcome = max(self._communicator.all_gather_object(statistics.median(self._durations)))
        parted = abs(outcome - self._forecast) > _TOLERANCE * outcome
        self._tell(
            f"gradients are there after {_milliseconds(outcome)}, {_milliseconds(self._forecast)} were forecast"
            f"{': measuring anew' if parted else ''}"
        )
        self._watched *= 2  # what is well known is looked at more and more seldom
        self._outcome = outcome if parted else None
        self._turn(measures=parted)

    def _turn(self, measures: bool) -> None:
        self._measures, self._seen = measures, 0
        self._durations, self._fills = [], []

    def _backward_pass(self) -> BackwardPass:
        """The median of the steps timed, of the slowest rank."""
        own = [statistics.median(times) for times in zip(*self._fills, strict=True)]
        own.append(statistics.median(self._durations))
        slowest = [max(times) for times in zip(*self._communicator.all_gather_object(own), strict=True)]
        return BackwardPass(slowest[:-1], slowest[-1])

    def _correct(self, backward: BackwardPass, trials: Mapping[str, Sequence[Cost]], shares_core: bool) -> None:
        """Finds the factor between what the codecs now in use cost by the last outcome, and by their trials."""
        names = [codec.name for codec in self._codecs]
        tried = [trials[name][index] for index, name in enumerate(names)]
        low, high = 1 / _MOST_WRONG, _MOST_WRONG
        for _ in range(30):
            factor = (low * high) ** 0.5
            if arrival(backward, _scaled(tried, factor), shares_core) < (self._outcome or 0.0):
                low = factor
            else:
                high = factor
        self._corrections.update(dict.fromkeys(names, factor))
        self._outcome = None

    def _try_sizes(self, try_: Try, name: str) -> list[Cost]:
        """The cost of each bucket, from trials of the smallest and the largest."""
        sizes = [codec.bucket.buffer.numel() for codec in self._codecs]
        least, most = min(sizes), max(sizes)
        small = try_(sizes.index(least), name)
        large = try_(sizes.index(most), name) if most > least else small

        def between(size: int) -> Cost:
            share = (size - least) / max(1, most - least)
            return Cost(*(low + share * (high - low) for low, high in zip(small, large, strict=True)))

        return [between(size) for size in sizes]

    def _tell(self, sentence: str) -> None:
        if self._communicator.rank == 0:
            logger.info("codec auto: %s", sentence)


def _scaled(costs: Sequence[Cost], factor: float) -> list[Cost]:
    return [Cost(cost.computing * factor, cost.travelling * factor) for cost in costs]


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{name} for {count} of {len(names)} buckets" for name, count in Counter(names).items())


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
