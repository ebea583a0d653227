"""Codec `auto`: measures the backward pass and the cost of each codec, and chooses the codec of every bucket.

1. Measure. For some steps gradients are sent after the backward pass, so that nothing disturbs it while it is
   timed. Then the cost of each codec is measured on buckets.
2. Compare. The plan whose gradients are forecast to arrive soonest (forecast.py), and each codec by itself in
   buckets of the size that suits it, unless it is forecast to be far slower, are used for some steps each: their
   effect on the backward pass and on the cores shows only there. The fastest plan is kept.
3. Watch. If steps of the chosen plan become slower or faster than they were in the comparison, because a link
   has changed, everything is measured anew.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hvdlm.comm.communicator import Communicator
from hvdlm.gradients.auto.forecast import WORTHWHILE, BackwardPass, Cost, choose_codecs, finish_time
from hvdlm.gradients.auto.plan import CodecPlan
from hvdlm.gradients.auto.probe import threads_share_core
from hvdlm.gradients.bucket import bucket_sizes
from hvdlm.timing import Timestamp

logger = logging.getLogger(__name__)

# Steps: the first of a run compile and allocate; then the backward pass is timed; then each plan is compared, whose
# first step does not count; then the chosen plan is watched.
_WARM_UP_STEPS = 2
_MEASURED_STEPS = 3
_COMPARED_STEPS = 3
_WATCHED_STEPS = 10

# Relative difference between a plan's steps and those by which it was chosen, beyond which all is measured anew.
_TOLERANCE = 0.1

# Share of the backward pass for which steps wait for gradients, beyond which that is said.
_LONG_WAIT = 0.2

# Relative error of forecasts: a plan is compared if it is forecast to be at most so much slower than the fastest.
_FORECAST_ERROR = 0.5

ProbeBucket = Callable[[int, str], Cost]


@dataclass
class _ComparedPlan:
    """A plan, and the seconds from the beginning of the backward pass until all gradients have arrived."""

    plan: CodecPlan
    forecast: float
    measured: float = 0.0


class CodecTuner:
    """Decides `plan`, which all ranks use from the beginning of the next step on.

    GradientSync reports every step to it; all ranks call everything in the same order.
    """

    def __init__(
        self,
        communicator: Communicator,
        device: torch.device,
        parameters: Mapping[str, nn.Parameter],
        bucket_bytes: int,
        candidates: Mapping[str, int],
    ) -> None:
        """`bucket_bytes`: of buckets in which all is measured, and of plans with several codecs. `candidates`: bytes of
        the buckets that suit a codec, by its name, those that lose less first.
        """
        self._communicator, self._device, self._parameters = communicator, device, parameters
        self._bucket_bytes, self._candidates = bucket_bytes, candidates
        self.plan = self._measuring_plan(next(iter(candidates)))
        self._is_measuring = communicator.size > 1
        self._steps = -_WARM_UP_STEPS  # in the present phase
        self._watched_steps = _WATCHED_STEPS
        self._expected = 0.0  # seconds of the chosen plan
        self._backward_end = 0.0  # seconds of the backward pass alone, as it was measured last
        self._compared: list[_ComparedPlan] = []  # empty outside the second phase
        self._current = 0  # index of the plan in use
        self._durations: list[float] = []
        self._ready_times: list[list[float]] = []
        self._ready: list[Timestamp] = []

    @property
    def sends_after_backward(self) -> bool:
        """Whether no bucket is to be sent before the backward pass ends."""
        return self._is_measuring

    def backward_started(self) -> None:
        """The last backward pass of a step begins."""
        self._began, self._ready = Timestamp(self._device), []

    def bucket_ready(self) -> None:
        """The next bucket is ready."""
        if self._is_measuring:
            self._ready.append(Timestamp(self._device))

    def backward_ended(self) -> None:
        """The last backward pass of a step has ended."""
        if self._is_measuring:
            self._record(Timestamp(self._device))

    def gradients_arrived(self, probe: ProbeBucket) -> None:
        """All gradients have arrived. Collective where a phase ends; `probe` measures a bucket by a codec."""
        if self._communicator.size == 1:
            return
        if not self._is_measuring:
            self._record(Timestamp(self._device))
        self._steps += 1
        if self._is_measuring and self._steps == _MEASURED_STEPS:
            self._start_comparison(probe)
        elif self._compared and self._steps == _COMPARED_STEPS:
            self._end_compared()
        elif not self._is_measuring and not self._compared and self._steps == self._watched_steps:
            self._check_expected()

    def state_dict(self, plan_in_use: CodecPlan) -> dict[str, Any]:
        """`plan_in_use`: the plan of the last step, to whose codecs the residuals belong."""
        is_chosen = not self._is_measuring and not self._compared and plan_in_use == self.plan
        return {**asdict(plan_in_use), "expected": self._expected, "measures": not is_chosen}

    def load_state_dict(self, state: Mapping[str, Any], same_ranks: bool) -> None:
        """Restores a saved plan, on as many ranks and with the same buckets and candidates; else measures anew."""
        plan = CodecPlan(state["bucket_bytes"], state["names"])
        is_known = plan.bucket_bytes in (self._bucket_bytes, *self._candidates.values())
        is_known &= set(plan.names) <= self._candidates.keys()
        if same_ranks and is_known and len(plan.names) == len(self._sizes(plan.bucket_bytes)):
            self.plan, self._expected, self._is_measuring = plan, state["expected"], state["measures"]
            if self._is_measuring:
                self._use_measuring_plan()

    def _record(self, end: Timestamp) -> None:
        if self._steps >= 0:
            self._durations.append(end - self._began)
            if self._is_measuring:
                self._ready_times.append([ready - self._began for ready in self._ready])

    def _start_comparison(self, probe: ProbeBucket) -> None:
        backward = self._backward_pass()
        self._backward_end = backward.end
        sizes = self._sizes(self._bucket_bytes)
        costs = {name: self._cost_by_size(probe, name, sizes) for name in self._candidates}
        shares_core = self._device.type == "cpu" and threads_share_core(self._communicator)
        costs_of_buckets = {name: [cost(size) for size in sizes] for name, cost in costs.items()}
        mixed = CodecPlan(self._bucket_bytes, choose_codecs(backward, costs_of_buckets, shares_core))
        plans = [*([mixed] if len(set(mixed.names)) > 1 else []), *map(self._uniform_plan, self._candidates)]

        def forecast(plan: CodecPlan) -> float:
            plan_sizes = self._sizes(plan.bucket_bytes)
            # a bucket is ready when its last element is, interpolated between the measured buckets
            ready = np.interp(np.cumsum(plan_sizes), np.cumsum(sizes), backward.ready).tolist()
            plan_costs = [costs[name](size) for name, size in zip(plan.names, plan_sizes, strict=True)]
            return finish_time(BackwardPass(ready, backward.end), plan_costs, shares_core)

        compared = [_ComparedPlan(plan, forecast(plan)) for plan in plans]
        latest = (1 + _FORECAST_ERROR) * min(each.forecast for each in compared)
        self._compared = [each for each in compared if each.forecast <= latest]
        forecasts = ", ".join(f"{each.plan} {_milliseconds(each.forecast)}" for each in compared)
        self._log(f"the backward pass takes {_milliseconds(backward.end)}; gradients should arrive after: {forecasts}")
        self._is_measuring = False
        self._use_compared(0)

    def _use_compared(self, index: int) -> None:
        self._current = index
        self.plan = self._compared[index].plan
        self._start_phase(is_measuring=False)
        self._steps = -1

    def _end_compared(self) -> None:
        self._compared[self._current].measured = self._slowest_median()
        if self._current + 1 < len(self._compared):
            self._use_compared(self._current + 1)
            return
        fastest = min(self._compared, key=lambda each: each.measured)
        # Of plans that are next to nothing slower, the one that loses least; a plan of several codecs counts as fastest
        near = [each for each in self._compared if each.measured * (1 - WORTHWHILE) <= fastest.measured]
        uniform = [each for name in self._candidates for each in near if set(each.plan.names) == {name}]
        chosen = uniform[0] if uniform else fastest
        measured = ", ".join(f"{each.plan} {_milliseconds(each.measured)}" for each in self._compared)
        self._log(f"gradients arrived after: {measured}; so {chosen.plan}")
        waiting = chosen.measured - self._backward_end
        if waiting > _LONG_WAIT * self._backward_end:
            self._log(
                f"a step waits {_milliseconds(waiting)} for them even so: averages of local steps would not be waited "
                "for, at some cost in loss (docs/local-steps.md)"
            )
        self.plan, self._expected, self._compared = chosen.plan, chosen.measured, []
        self._start_phase(is_measuring=False)
        self._steps = -1

    def _check_expected(self) -> None:
        measured = self._slowest_median()
        has_changed = abs(measured - self._expected) > _TOLERANCE * measured
        self._log(
            f"gradients arrive after {_milliseconds(measured)}, {_milliseconds(self._expected)} were expected"
            f"{': measuring anew' if has_changed else ''}"
        )
        self._watched_steps *= 2  # a plan that has proved right is checked less and less often
        self._start_phase(is_measuring=has_changed)
        if has_changed:
            self._use_measuring_plan()

    def _slowest_median(self) -> float:
        return max(self._communicator.all_gather_object(statistics.median(self._durations)))

    def _use_measuring_plan(self) -> None:
        if self.plan.bucket_bytes != self._bucket_bytes:
            self.plan = self._measuring_plan(self.plan.names[0])

    def _measuring_plan(self, name: str) -> CodecPlan:
        """The buckets in which all is measured, all by codec `name`."""
        return CodecPlan(self._bucket_bytes, [name] * len(self._sizes(self._bucket_bytes)))

    def _uniform_plan(self, name: str) -> CodecPlan:
        """All by codec `name`, in buckets of the size that suits it."""
        nbytes = self._candidates[name]
        return CodecPlan(nbytes, [name] * len(self._sizes(nbytes)))

    def _sizes(self, nbytes: int) -> list[int]:
        return bucket_sizes(self._parameters, nbytes)

    def _start_phase(self, is_measuring: bool) -> None:
        self._is_measuring, self._steps = is_measuring, 0
        self._durations, self._ready_times = [], []

    def _backward_pass(self) -> BackwardPass:
        """The median of the measured steps, of the slowest rank."""
        own = [statistics.median(times) for times in zip(*self._ready_times, strict=True)]
        own.append(statistics.median(self._durations))
        slowest = [max(times) for times in zip(*self._communicator.all_gather_object(own), strict=True)]
        return BackwardPass(slowest[:-1], slowest[-1])

    def _cost_by_size(self, probe: ProbeBucket, name: str, sizes: Sequence[int]) -> Callable[[int], Cost]:
        """The cost of a bucket as a linear function of its elements, from the smallest and the largest bucket."""
        smallest, largest = min(sizes), max(sizes)
        high = probe(sizes.index(largest), name)
        low = probe(sizes.index(smallest), name) if largest > smallest else Cost(0.0, 0.0)
        smallest = smallest if largest > smallest else 0

        def cost(size: int) -> Cost:
            share = (size - smallest) / (largest - smallest)
            return Cost(*(max(0.0, a + share * (b - a)) for a, b in zip(low, high, strict=True)))

        return cost

    def _log(self, sentence: str) -> None:
        if self._communicator.rank == 0:
            logger.info("codec auto: %s", sentence)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
