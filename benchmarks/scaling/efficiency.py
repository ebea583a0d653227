"""Throughput, efficiency and the parts of a step, computed from the points of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvdlm.gradients.codecs.registry import AUTO
from hvdlm.scaling.point import Point
from hvdlm.scaling.statistics import Estimate, trimmed_mean

# The parts of a step in the order of the stacked bars; forward and backward pass are one
PARTS = ("data", "compute", "exposed communication", "optimizer")

_PART_OF_PHASE = {
    "data": "data",
    "forward": "compute",
    "backward": "compute",
    "wait": "exposed communication",
    "optimizer": "optimizer",
}


@dataclass(frozen=True)
class Summary:
    """The figures of a valid point."""

    point: Point
    tokens_per_second: Estimate
    efficiency: float | None  # None: codec none was not measured on the fewest ranks
    parts: dict[str, float]  # seconds per step, means over ranks and repetitions


def summarise(points: Sequence[Point]) -> list[Summary]:
    """Summaries of the valid points, sorted by link, codec and ranks.

    Efficiency is tokens/s per rank, over tokens/s per rank on the fewest ranks with codec none and the same model and
    batch size (of a rank in a weak study, of all ranks in a strong one).
    """
    valid = [point for point in points if point.is_valid]
    ordered = sorted(valid, key=lambda p: (_group(p), p.place.link_bits_per_second or 0, p.codec, p.ranks))
    return [Summary(point, _speed(point), _efficiency(point, ordered), _parts(point)) for point in ordered]


def groups(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Summaries by model and batch size, as a title: those of one group differ in ranks, links and codecs only."""
    found: dict[str, list[Summary]] = {}
    for each in summaries:
        _, _, batch = _group(each.point)
        scope = "of a rank" if each.point.mode == "weak" else "of all ranks"
        title = f"{each.point.settings['model']['preset']}, {batch} sequences {scope}"
        found.setdefault(title, []).append(each)
    return found


def links(summaries: Sequence[Summary]) -> list[float | None]:
    """The rates of the links between hosts, in bits/s, ascending; [None] if none is known or there is one host only."""
    rates = {s.point.place.link_bits_per_second for s in summaries if not s.point.place.is_one_host}
    return sorted(rates or {None}, key=lambda rate: rate or 0)


def with_link(link: float | None, summaries: Sequence[Summary]) -> list[Summary]:
    """Points with this link, and those on one host, which use none."""
    return [s for s in summaries if s.point.place.link_bits_per_second == link or s.point.place.is_one_host]


def shortfall_of_auto(summaries: Sequence[Summary]) -> list[tuple[Summary, Summary, float]]:
    """Each point of codec auto, the best fixed codec at the same setting, and by what share auto has fewer tokens/s."""
    found = []
    for auto in summaries:
        if auto.point.codec != AUTO or auto.point.ranks == 1:
            continue
        fixed = [
            other
            for other in summaries
            if other.point.codec != AUTO
            and _group(other.point) == _group(auto.point)
            and other.point.ranks == auto.point.ranks
            and other.point.place.link_bits_per_second == auto.point.place.link_bits_per_second
        ]
        if fixed:
            best = max(fixed, key=lambda each: each.tokens_per_second.mean)
            found.append((auto, best, 1 - auto.tokens_per_second.mean / best.tokens_per_second.mean))
    return found


def _group(point: Point) -> tuple[str, str, int]:
    """Points of one group differ in ranks, links and codecs only."""
    train = point.settings["train"]
    batch = train["global_batch_size"] // (point.ranks if point.mode == "weak" else 1)
    return point.mode, str(point.settings["model"]), batch


def _speed(point: Point) -> Estimate:
    return trimmed_mean([point.tokens_per_step / each.seconds for each in point.repetitions])


def _efficiency(point: Point, points: Sequence[Point]) -> float | None:
    link = point.place.link_bits_per_second
    same_link = [each for each in points if each.place.link_bits_per_second in (link, None)]  # None: one host
    dense = [each for each in same_link if _group(each) == _group(point) and each.codec == "none"]
    if not dense:
        return None
    base = min(dense, key=lambda each: each.ranks)
    return (_speed(point).mean / point.ranks) / (_speed(base).mean / base.ranks)


def _parts(point: Point) -> dict[str, float]:
    of_ranks = [phases for repetition in point.repetitions for phases in repetition.phase_seconds]
    parts = dict.fromkeys(PARTS, 0.0)
    for phases in of_ranks:
        for phase, seconds in phases.items():
            parts[_PART_OF_PHASE[phase]] += seconds / len(of_ranks)
    return parts
