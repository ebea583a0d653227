"""Is the performance model right? It is fitted to a part of the points and forecasts the others."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.registry import AUTO
from hvdlm.scaling.fit import fit, step_seconds
from hvdlm.scaling.performance import PerformanceModel, forecast
from hvdlm.scaling.point import Point
from hvdlm.scaling.scenario import of_point

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Residual:
    """A point and its forecast by a model that has not seen it; seconds of a step."""

    ranks: int
    link: float | None
    codec: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Holdout:
    """What a fit did not see, and how far off it was."""

    name: str
    residuals: list[Residual]

    @property
    def mape(self) -> float:
        """Mean absolute percentage error, as a fraction."""
        return statistics.fmean(abs(residual.error) for residual in self.residuals)


def hold_out(points: Sequence[Point]) -> list[Holdout]:
    """Fits to the fewer half of the rank counts, and to all links but each, and forecasts the rest.

    What cannot be fitted is said, and left out.
    """
    ranks = sorted({point.ranks for point in points})
    most = ranks[: max(2, len(ranks) // 2)][-1]
    few = [point for point in points if point.ranks <= most]
    tries = [
        (f"fitted to up to {most} ranks, held out: {more} ranks", few, [each for each in points if each.ranks == more])
        for more in ranks
        if more > most
    ]
    links = sorted({rate for point in points if (rate := point.place.link_bits_per_second) is not None})
    for link in links if len(links) > 1 else []:
        others = [point for point in points if point.place.link_bits_per_second != link]
        own = [point for point in points if point.place.link_bits_per_second == link]
        tries.append((f"held out: links of {link / 1e6:,g} Mbit/s", others, own))
    found = []
    for title, seen, unseen in tries:
        try:
            errors = residuals(fit(seen), unseen)
        except HvdlmError as error:
            logger.warning("not %s: %s", title, error)
            continue
        if errors:
            found.append(Holdout(title, errors))
    return found


def residuals(model: PerformanceModel, points: Sequence[Point]) -> list[Residual]:
    """Of points whose codecs the model knows."""
    known = [point for point in points if point.codec in model.codecs or point.codec == AUTO]
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
    """Of log(predicted / measured)."""
    return math.sqrt(statistics.fmean(math.log(each.predicted / each.measured) ** 2 for each in found))
