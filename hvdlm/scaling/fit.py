"""Makes a performance model from the points of a study.

The costs of compute, codecs, spread and start-up are medians of what the points measured. The efficiency and latency of
links, which affect whole steps only, are fitted by least squares over log(predicted / measured).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.registry import AUTO
from hvdlm.scaling.forecast import forecast
from hvdlm.scaling.performance_model import CodecCost, Measured, Network, PerformanceModel
from hvdlm.scaling.point import Point, Repetition
from hvdlm.scaling.scenario import of_point
from hvdlm.scaling.statistics import trimmed_mean

# Lower bound, first guess and upper bound of what a link carries: a share of its rate if that is known, else bits/s.
_EFFICIENCIES = (0.05, 0.9, 1.0)
_RATES = (1e5, 1e9, 1e13)

_FIRST_LATENCY, _MAX_LATENCY = 2e-4, 0.1  # seconds per hop


def fit(points: Sequence[Point]) -> PerformanceModel:
    """Fits a model to the valid points. Raises HvdlmError if they are of several machines or models, or too few."""
    usable = [point for point in points if point.is_valid]
    if not usable:
        raise HvdlmError("no valid point to fit: measure some with benchmarks/scaling.py")
    several = {
        (point.machine.cpu, point.machine.gpu, point.vocab_size, str(point.settings["model"])) for point in usable
    }
    if len(several) > 1:
        raise HvdlmError(f"the points are of {len(several)} machines or models: fit each separately")
    fewest = min(point.ranks for point in usable)
    base = [point for point in usable if point.ranks == fewest and point.codec == "none"]
    shared = [point for point in usable if point.ranks > 1 and point.codec != AUTO]
    if not base or not shared:
        raise HvdlmError("a fit needs codec none on the fewest ranks, and points of two ranks or more")
    model = _measured_costs(usable, base, shared)
    scenarios = [of_point(point) for point in shared]
    measured = [math.log(step_seconds(point)) for point in shared]
    on_one_host = [point for point in shared if point.place.is_one_host]
    on_hosts = [point for point in shared if not point.place.is_one_host]
    knows_rates = all(point.place.link_bits_per_second is not None for point in on_hosts)

    def with_networks(values: NDArray[np.float64]) -> PerformanceModel:
        """`values`: for each network, the logarithm of what it carries, and its latency over the first guess."""
        found = iter(values)
        return model.model_copy(
            update={
                "inside": _network(float(next(found)), float(next(found)), False) if on_one_host else None,
                "between": _network(float(next(found)), float(next(found)), knows_rates) if on_hosts else None,
            }
        )

    def residuals(values: NDArray[np.float64]) -> NDArray[np.float64]:
        candidate = with_networks(values)
        logs = [math.log(forecast(candidate, scenario).seconds) for scenario in scenarios]
        return np.subtract(logs, measured)

    bounds = [*([_RATES] if on_one_host else []), *([_EFFICIENCIES if knows_rates else _RATES] if on_hosts else [])]
    found = least_squares(
        residuals,
        x0=[value for _, guess, _ in bounds for value in (math.log(guess), 1.0)],
        bounds=(
            [value for low, _, _ in bounds for value in (math.log(low), 0.0)],
            [value for _, _, high in bounds for value in (math.log(high), _MAX_LATENCY / _FIRST_LATENCY)],
        ),
        diff_step=1e-3,  # forecasts are not smooth over smaller steps
    )
    best = with_networks(found.x)
    return best.model_copy(update={"residual": float(np.sqrt(np.mean(residuals(found.x) ** 2)))})


def _network(log_carried: float, latency: float, knows_rate: bool) -> Network:
    carried = math.exp(log_carried)
    return Network(
        efficiency=carried if knows_rate else 1.0,
        latency=latency * _FIRST_LATENCY,
        bits_per_second=None if knows_rate else carried,
    )


def step_seconds(point: Point) -> float:
    """Seconds of a step on the slowest rank, over all repetitions."""
    return trimmed_mean([repetition.seconds for repetition in point.repetitions]).mean


def _measured_costs(usable: Sequence[Point], base: Sequence[Point], shared: Sequence[Point]) -> PerformanceModel:
    """The model without its networks.

    `base`: codec none on the fewest ranks; `shared`: several ranks, codec auto excepted.
    """
    first = base[0]
    scenario = of_point(first)
    flops = scenario.flops_per_token * scenario.tokens
    alone = [repetition for point in base for repetition in point.repetitions]
    starts = {
        # the codec that is measured first in its job has the shortest start-up
        ranks: min(r.start_seconds for p in usable if p.ranks == ranks for r in p.repetitions)
        for ranks in {point.ranks for point in usable}
    }
    fewest, most = min(starts), max(starts)
    return PerformanceModel(
        machine=first.machine,
        ranks_per_host=max(point.place.ranks_per_host for point in usable),
        is_simulated=first.simulated_tokens_per_second is not None,
        uses_gpu=first.machine.gpu is not None and first.settings["train"]["device"] != "cpu",
        channels=max(point.channels for point in usable),
        data_seconds=_phase(alone, "data"),
        forward_seconds_per_flop=_phase(alone, "forward") / flops,
        backward_seconds_per_flop=_phase(alone, "backward") / flops,
        optimizer_seconds_per_element=_phase(alone, "optimizer") / sum(scenario.elements),
        merge_seconds_per_element=_merge_seconds(usable, alone, sum(scenario.elements)),
        spread=_median([_spread(repetition) for repetition in alone]),
        start_seconds=starts[fewest],
        start_seconds_per_rank=(starts[most] - starts[fewest]) / max(1, most - fewest),
        codecs={name: _codec_cost(name, shared, alone) for name in sorted({p.codec_name for p in shared})},
        inside=None,
        between=None,
        residual=0.0,
        measured=Measured(
            ranks=sorted({point.ranks for point in usable}),
            links=sorted({p.place.link_bits_per_second for p in shared}, key=lambda rate: rate or 0.0),
            codecs=sorted({point.codec_name for point in usable}),
            candidates=next((p.settings["compression"]["candidates"] for p in usable if p.codec == AUTO), None),
            tokens=scenario.tokens,
            points=len(usable),
        ),
    )


def _merge_seconds(usable: Sequence[Point], alone: Sequence[Repetition], elements: int) -> float:
    """Seconds in which a rank begins and ends a round, per number of the model: what it waits more than `alone` in the
    steps that wait least for others, of the fewest ranks; 0 without local steps.
    """
    own = [point for point in usable if point.has_local_steps and point.ranks > 1]
    fewest = [point for point in own if point.ranks == min(each.ranks for each in own)]
    waits = [(_phase(point.repetitions, "wait") - _phase(alone, "wait")) * point.every for point in fewest]
    return max(0.0, min(waits, default=0.0)) / elements


def _codec_cost(name: str, shared: Sequence[Point], alone: Sequence[Repetition]) -> CodecCost:
    """From the points with the fewest ranks, each of which has the most cores; with local steps where there are no
    others.
    """
    named = [point for point in shared if point.codec_name == name]
    own = [point for point in named if not point.has_local_steps] or named
    fewest = [point for point in own if point.ranks == min(each.ranks for each in own)]
    elements = sum(bucket.elements for bucket in fewest[0].buckets)
    codec = _median([point.every * each.codec_seconds for point in fewest for each in point.repetitions])
    idle = _median([repetition.core_seconds for repetition in alone])
    # The smallest of all links, the fastest one's: on a slow link most of this time is polling
    per_byte = min(
        _median([max(0.0, r.core_seconds - idle - r.codec_seconds) / r.wire_bytes for r in point.repetitions])
        for point in fewest
    )
    return CodecCost(seconds_per_element=codec / elements, core_seconds_per_byte=per_byte)


def _phase(repetitions: Sequence[Repetition], name: str) -> float:
    """Median seconds of a phase of a step, over repetitions and ranks."""
    return _median([rank.get(name, 0.0) for repetition in repetitions for rank in repetition.phase_seconds])


def _spread(repetition: Repetition) -> float:
    """Standard deviation of a rank's steps over their mean; mean over ranks."""
    relative = [statistics.pstdev(steps) / statistics.fmean(steps) for steps in repetition.step_seconds]
    return statistics.fmean(relative)


def _median(values: Sequence[float]) -> float:
    """0 if there are no values."""
    return statistics.median(values) if values else 0.0
