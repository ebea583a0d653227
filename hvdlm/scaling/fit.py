"""From points to a performance model: what can be measured by itself is read off, what cannot is fitted.

Compute, codecs, spread and start-up are read off the points. The efficiency and the latency of links, which show only
in how long whole steps take, are those with which the forecasts of all points come nearest, by least squares over
log(predicted / measured).
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
from hvdlm.scaling.performance import CodecCost, Measured, Network, PerformanceModel, forecast
from hvdlm.scaling.point import Point, Repetition
from hvdlm.scaling.scenario import of_point
from hvdlm.scaling.statistics import trimmed_mean

# The least, usual and most that a link carries: of its rate where that is known, else in bits/s.
_EFFICIENCIES = (0.05, 0.9, 1.0)
_RATES = (1e5, 1e9, 1e13)

_USUAL_LATENCY, _MOST_LATENCY = 2e-4, 0.1  # seconds a hop


def fit(points: Sequence[Point]) -> PerformanceModel:
    """Raises HvdlmError where points are of several machines or models, or too few."""
    usable = [point for point in points if point.is_valid]
    if not usable:
        raise HvdlmError("no valid point to fit: measure some with benchmarks/scaling.py")
    several = {
        (point.machine.cpu, point.machine.gpu, point.vocab_size, str(point.settings["model"])) for point in usable
    }
    if len(several) > 1:
        raise HvdlmError(f"the points are of {len(several)} machines or models: fit each by itself")
    least = min(point.ranks for point in usable)
    base = [point for point in usable if point.ranks == least and point.codec == "none"]
    together = [point for point in usable if point.ranks > 1 and point.codec != AUTO]
    if not base or not together:
        raise HvdlmError("a fit needs codec none on the fewest ranks, and points of two ranks or more")
    model = _read_off(usable, base, together)
    scenarios = [of_point(point) for point in together]
    measured = [math.log(step_seconds(point)) for point in together]
    inside = [point for point in together if point.place.is_one_host]
    between = [point for point in together if not point.place.is_one_host]
    knows_rates = all(point.place.link_bits_per_second is not None for point in between)

    def at(values: NDArray[np.float64]) -> PerformanceModel:
        """`values`: for each kind of link that was passed, the logarithm of what it carries, and its latency."""
        found = iter(values)
        return model.model_copy(
            update={
                "inside": _network(float(next(found)), float(next(found)), False) if inside else None,
                "between": _network(float(next(found)), float(next(found)), knows_rates) if between else None,
            }
        )

    def residuals(values: NDArray[np.float64]) -> NDArray[np.float64]:
        tried = at(values)
        logs = [math.log(forecast(tried, scenario).seconds) for scenario in scenarios]
        return np.subtract(logs, measured)

    sides = [*([_RATES] if inside else []), *([_EFFICIENCIES if knows_rates else _RATES] if between else [])]
    found = least_squares(
        residuals,
        x0=[value for _, usual, _ in sides for value in (math.log(usual), 1.0)],
        bounds=(
            [value for least, _, _ in sides for value in (math.log(least), 0.0)],
            [value for _, _, most in sides for value in (math.log(most), _MOST_LATENCY / _USUAL_LATENCY)],
        ),
        diff_step=1e-3,  # a forecast is not smooth in small
    )
    best = at(found.x)
    return best.model_copy(update={"residual": float(np.sqrt(np.mean(residuals(found.x) ** 2)))})


def _network(log_carried: float, latency: float, knows_rate: bool) -> Network:
    carried = math.exp(log_carried)
    return Network(
        efficiency=carried if knows_rate else 1.0,
        latency=latency * _USUAL_LATENCY,
        bits_per_second=None if knows_rate else carried,
    )


def step_seconds(point: Point) -> float:
    """Of the slowest rank, over all repetitions."""
    return trimmed_mean([repetition.seconds for repetition in point.repetitions]).mean


def _read_off(usable: Sequence[Point], base: Sequence[Point], together: Sequence[Point]) -> PerformanceModel:
    first = base[0]
    scenario = of_point(first)
    flops = scenario.flops_per_token * scenario.tokens
    alone = [repetition for point in base for repetition in point.repetitions]
    starts = {
        # of whichever codec came first in its job
        ranks: min(r.start_seconds for p in usable if p.ranks == ranks for r in p.repetitions)
        for ranks in {point.ranks for point in usable}
    }
    fewest, most = min(starts), max(starts)
    return PerformanceModel(
        machine=first.machine,
        ranks_per_host=max(point.place.ranks_per_host for point in usable),
        is_simulated=first.simulated_tokens_per_second is not None,
        uses_gpu=first.machine.gpu is not None and first.settings["train"]["device"] != "cpu",
        lanes=max(point.lanes for point in usable),
        data_seconds=_lap(alone, "data"),
        forward_seconds_per_flop=_lap(alone, "forward") / flops,
        backward_seconds_per_flop=_lap(alone, "backward") / flops,
        optimizer_seconds_per_element=_lap(alone, "optimizer") / sum(scenario.elements),
        spread=_median([_spread(repetition) for repetition in alone]),
        start_seconds=starts[fewest],
        start_seconds_per_rank=(starts[most] - starts[fewest]) / max(1, most - fewest),
        codecs={name: _codec_cost(name, together, alone) for name in sorted({p.codec for p in together})},
        inside=None,
        between=None,
        residual=0.0,
        measured=Measured(
            ranks=sorted({point.ranks for point in usable}),
            links=sorted({p.place.link_bits_per_second for p in together}, key=lambda rate: rate or 0.0),
            codecs=sorted({point.codec for point in usable}),
            candidates=next((p.settings["compression"]["candidates"] for p in usable if p.codec == AUTO), None),
            tokens=scenario.tokens,
            points=len(usable),
        ),
    )


def _codec_cost(name: str, together: Sequence[Point], alone: Sequence[Repetition]) -> CodecCost:
    """From the fewest ranks that used it, who had the most of the cores."""
    own = [point for point in together if point.codec == name]
    fewest = [point for point in own if point.ranks == min(each.ranks for each in own)]
    elements = sum(bucket.elements for bucket in fewest[0].buckets)
    codec = _median([repetition.codec_seconds for point in fewest for repetition in point.repetitions])
    idle = _median([repetition.core_seconds for repetition in alone])
    # On the fastest link: on a slow one most of it is looking whether something has come
    per_byte = min(
        _median([max(0.0, r.core_seconds - idle - r.codec_seconds) / r.wire_bytes for r in point.repetitions])
        for point in fewest
    )
    return CodecCost(seconds_per_element=codec / elements, core_seconds_per_byte=per_byte)


def _lap(repetitions: Sequence[Repetition], name: str) -> float:
    """Median seconds over repetitions and ranks."""
    return _median([lap.get(name, 0.0) for repetition in repetitions for lap in repetition.laps])


def _spread(repetition: Repetition) -> float:
    """Standard deviation of a rank's steps over their mean, of all ranks together."""
    relative = [statistics.pstdev(steps) / statistics.fmean(steps) for steps in repetition.step_seconds]
    return statistics.fmean(relative)


def _median(values: Sequence[float]) -> float:
    """Zero of none."""
    return statistics.median(values) if values else 0.0
