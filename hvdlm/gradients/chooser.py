"""Codec `auto`: measures what each codec costs here and how the backward pass goes, and chooses for every bucket.

In the first steps gradients are sent after the backward pass, so that nothing disturbs it while it is timed. Then each
codec is tried on real buckets. The choice with which gradients should arrive soonest (forecast.py), and every codec by
itself that is not far behind it, then run a race of a few steps each: what they do to the backward pass, to each other
and to the cores shows only there. The winner stays, and is watched; where its steps and its race part, because a link
has changed, all is measured anew.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.gradients.codec_trial import threads_take_turns
from hvdlm.gradients.codecs.switching import Switching
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


@dataclass
class _Contender:
    """A codec for each bucket; seconds from the beginning of the backward pass until all gradients are there."""

    names: list[str]
    forecast: float
    outcome: float = 0.0


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

    def state_dict(self) -> dict[str, Any]:
        codecs = [codec.name for codec in self._codecs]
        return {"codecs": codecs, "expected": self._expected, "measures": self._measures or bool(self._race)}

    def load_state_dict(self, state: Mapping[str, Any], same_ranks: bool) -> None:
        """Goes on with a choice, on as many ranks and with the same buckets and candidates; else measures anew."""
        names = state["codecs"]
        if same_ranks and len(names) == len(self._codecs) and set(names) <= set(self._candidates):
            self._become(names)
            self._expected, self._measures = state["expected"], state["measures"]

    def _record(self, end: Moment) -> None:
        if self._seen >= 0:
            self._durations.append(end - self._began)
            if self._measures:
                self._fills.append([full - self._began for full in self._full])

    def _choose(self, try_: Try) -> None:
        backward = self._backward_pass()
        trials = {name: self._try_sizes(try_, name) for name in self._candidates}
        shares_core = self._device.type == "cpu" and threads_take_turns(self._communicator)
        names = choose(backward, trials, shares_core)
        uniform = [[name] * len(self._codecs) for name in self._candidates]
        forecasts = [
            _Contender(each, arrival(backward, [trials[name][i] for i, name in enumerate(each)], shares_core))
            for each in [names, *(each for each in uniform if each != names)]
        ]
        latest = (1 + _DOUBT) * min(each.forecast for each in forecasts)
        self._race = [each for each in forecasts if each.forecast <= latest]
        told = ", ".join(f"{_counted(each.names)} {_milliseconds(each.forecast)}" for each in forecasts)
        self._tell(f"the backward pass takes {_milliseconds(backward.end)}; gradients should be there after: {told}")
        self._measures = False
        self._start(0)

    def _start(self, contender: int) -> None:
        self._running = contender
        self._become(self._race[contender].names)
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
        alone = [each for name in self._candidates for each in near if set(each.names) == {name}]
        winner = alone[0] if alone else soonest
        told = ", ".join(f"{_counted(each.names)} {_milliseconds(each.outcome)}" for each in self._race)
        self._tell(f"gradients were there after: {told}; so {_counted(winner.names)}")
        self._expected, self._race = winner.outcome, []
        self._become(winner.names)
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

    def _slowest_median(self) -> float:
        return max(self._communicator.all_gather_object(statistics.median(self._durations)))

    def _become(self, names: Sequence[str]) -> None:
        for codec, name in zip(self._codecs, names, strict=True):
            codec.become(name)

    def _turn(self, measures: bool) -> None:
        self._measures, self._seen = measures, 0
        self._durations, self._fills = [], []

    def _backward_pass(self) -> BackwardPass:
        """The median of the steps timed, of the slowest rank."""
        own = [statistics.median(times) for times in zip(*self._fills, strict=True)]
        own.append(statistics.median(self._durations))
        slowest = [max(times) for times in zip(*self._communicator.all_gather_object(own), strict=True)]
        return BackwardPass(slowest[:-1], slowest[-1])

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


def _counted(names: Sequence[str]) -> str:
    """Which codecs for how many buckets; one that is all of them by its name alone."""
    counts = Counter(names)
    return " and ".join(f"{name} for {count}" if len(counts) > 1 else name for name, count in counts.items())


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
