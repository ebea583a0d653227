"""The error of performance models: fitted to a part of the points, they forecast the held-out ones."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.registry import AUTO
from hvdlm.scaling.fit import fit, step_seconds
from hvdlm.scaling.forecast import forecast
from hvdlm.scaling.performance_model import PerformanceModel
from hvdlm.scaling.point import Point
from hvdlm.scaling.scenario import of_point

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Residual:
    """A held-out point and its forecast, in seconds of a step."""

    ranks: int
    link: float | None  # bits/s
    codec: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative to the measurement."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Holdout:
    """The points that were held out of one fit."""

    name: str
    residuals: list[Residual]

    @property
    def mape(self) -> float:
        """Mean absolute percentage error, as a fraction."""
        return statistics.fmean(abs(residual.error) for residual in self.residuals)


def hold_out(points: Sequence[Point]) -> list[Holdout]:
    """Fits to the smaller half of the rank counts, and for each link to all others; forecasts the points left out.

    Logs a warning where a part of the points cannot be fitted.
    """
    ranks = sorted({point.ranks for point in points})
    max_fitted = ranks[: max(2, len(ranks) // 2)][-1]
    few = [point for point in points if point.ranks <= max_fitted]
    splits = [
        (
            f"fitted to up to {max_fitted} ranks, held out: {count} ranks",
            few,
            [each for each in points if each.ranks == count],
        )
        for count in ranks
        if count > max_fitted
    ]
    links = sorted({rate for point in points if (rate := point.place.link_bits_per_second) is not None})
    for link in links if len(links) > 1 else []:
        others = [point for point in points if point.place.link_bits_per_second != link]
        own = [point for point in points if point.place.link_bits_per_second == link]
        splits.append((f"held out: links of {link / 1e6:,g} Mbit/s", others, own))
    found = []
    for title, fitted, held_out in splits:
        try:
            errors = residuals(fit(fitted), held_out)
        except HvdlmError as error:
            logger.warning("cannot hold out (%s): %s", title, error)
            continue
        if errors:
            found.append(Holdout(title, errors))
    return found


def residuals(model: PerformanceModel, points: Sequence[Point]) -> list[Residual]:
    """Residuals of the points whose codecs the model knows."""
    known = [point for point in points if point.codec_name in (*model.codecs, AUTO)]
    return [
        Residual(
            point.ranks,
            point.place.link_bits_per_second,
            point.codec,
            step_seconds(point),
            forecast(model, of_point(point)).seconds,
        )
        for point in known
    ]


def root_mean_square(found: Sequence[Residual]) -> float:
    """The root mean square of log(predicted / measured)."""
    return math.sqrt(statistics.fmean(math.log(each.predicted / each.measured) ** 2 for each in found))
