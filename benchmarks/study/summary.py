"""What the points of a study come to: throughput, efficiency and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvdlm.gradients.codecs.choice import AUTO
from hvdlm.scaling.point import Point
from hvdlm.scaling.statistics import Estimate, trimmed_mean

# Laps of a step, as they are drawn one upon the other; forward and backward are one
PARTS = ("data", "compute", "exposed communication", "optimizer")

_PARTS_OF_LAP = {
    "data": "data",
    "forward": "compute",
    "backward": "compute",
    "wait": "exposed communication",
    "optimizer": "optimizer",
}


@dataclass(frozen=True)
class Summary:
    """A valid point; seconds of a step, on the slowest rank."""

    point: Point
    tokens_per_second: Estimate
    efficiency: float | None  # None: there is no point of one rank, or of the fewest, to compare with
    parts: dict[str, float]  # seconds, means over ranks and repetitions


def summarise(points: Sequence[Point]) -> list[Summary]:
    """The valid ones, by link, codec and ranks.

    Efficiency is tokens/s of a rank over tokens/s of a rank among the fewest that were measured with codec none, the
    same model and batch: in a weak study the batch of a rank is the same, in a strong one that of all.
    """
    valid = [point for point in points if point.is_valid]
    ordered = sorted(valid, key=lambda p: (_group(p), p.place.link_bits_per_second or 0, p.codec, p.ranks))
    return [Summary(point, _speed(point), _efficiency(point, ordered), _parts(point)) for point in ordered]


def groups(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """By model and batch, in words: those of one differ in ranks, links and codecs only."""
    found: dict[str, list[Summary]] = {}
    for each in summaries:
        _, _, batch = _group(each.point)
        whose = "of a rank" if each.point.mode == "weak" else "of all ranks"
        title = f"{each.point.settings['model']['preset']}, {batch} sequences {whose}"
        found.setdefault(title, []).append(each)
    return found


def links(summaries: Sequence[Summary]) -> list[float | None]:
    """The rates of the links that were passed, None where none is known or none was passed by any point."""
    rates = {s.point.place.link_bits_per_second for s in summaries if not s.point.place.is_one_host}
    return sorted(rates or {None}, key=lambda rate: rate or 0)


def behind(link: float | None, summaries: Sequence[Summary]) -> list[Summary]:
    """Points with this link, and those on one host, which pass none."""
    return [s for s in summaries if s.point.place.link_bits_per_second == link or s.point.place.is_one_host]


def shortfall_of_auto(summaries: Sequence[Summary]) -> list[tuple[Summary, Summary, float]]:
    """Each point of codec auto, the best point of a fixed codec beside it, and what auto lacks of its tokens/s."""
    found = []
    for auto in summaries:
        if auto.point.codec != AUTO or auto.point.ranks == 1:
            continue
        beside = [
            other
            for other in summaries
            if other.point.codec != AUTO
            and _group(other.point) == _group(auto.point)
            and other.point.ranks == auto.point.ranks
            and other.point.place.link_bits_per_second == auto.point.place.link_bits_per_second
        ]
        if beside:
            best = max(beside, key=lambda each: each.tokens_per_second.mean)
            found.append((auto, best, 1 - auto.tokens_per_second.mean / best.tokens_per_second.mean))
    return found


def _group(point: Point) -> tuple[str, str, int]:
    """Points of one group differ in ranks, links and codecs only."""
    train = point.settings["train"]
    batch = train["batch_size"] // (point.ranks if point.mode == "weak" else 1)
    return point.mode, str(point.settings["model"]), batch


def _speed(point: Point) -> Estimate:
    return trimmed_mean([point.tokens_per_step / each.seconds for each in point.repetitions])


def _efficiency(point: Point, points: Sequence[Point]) -> float | None:
    link = point.place.link_bits_per_second
    near = [each for each in points if each.place.link_bits_per_second in (link, None)]  # or on one host
    beside = [each for each in near if _group(each) == _group(point) and each.codec == "none"]
    if not beside:
        return None
    base = min(beside, key=lambda each: each.ranks)
    return (_speed(point).mean / point.ranks) / (_speed(base).mean / base.ranks)


def _parts(point: Point) -> dict[str, float]:
    laps = [lap for repetition in point.repetitions for lap in repetition.laps]
    parts = dict.fromkeys(PARTS, 0.0)
    for lap in laps:
        for name, seconds in lap.items():
            parts[_PARTS_OF_LAP[name]] += seconds / len(laps)
    return parts
