"""Forecasts when the gradients of a step have arrived, for given codecs of its buckets, and chooses codecs by that.

A step is simulated: the backward pass makes one bucket ready after the other, and the communication thread takes them
in that order, one at a time. Where that thread has no core of its own, its encoding and decoding slow down the backward
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# Share of the whole that compression must save to be worth its loss: less is within the noise of measurement.
WORTHWHILE = 0.01
# Share of the whole that may be given up for a codec that loses less.
_NEGLIGIBLE = 0.002


class Cost(NamedTuple):
    """Seconds that the communication thread takes for a bucket by a codec."""

    computing: float  # encoding and decoding messages
    communicating: float  # sending them, and waiting for those of others


class BackwardPass(NamedTuple):
    """Seconds from the beginning of an undisturbed backward pass until each bucket is ready, and until it ends."""

    ready: Sequence[float]  # ascending
    end: float


def finish_time(backward: BackwardPass, costs: Sequence[Cost], shares_core: bool) -> float:
    """Seconds from the beginning of the backward pass until it has ended and the last bucket has arrived.

    `costs`: of each bucket. `shares_core`: whether the communication thread and the backward pass share a core.
    """
    now = progress = 0.0  # the time, and the undisturbed time of the backward pass that has been done by then
    for ready, cost in zip(backward.ready, costs, strict=True):
        if ready > progress:
            now, progress = now + ready - progress, ready
        left = backward.end - progress
        now += cost.computing + (min(left, cost.computing) if shares_core else 0.0)
        now += cost.communicating
        progress = min(backward.end, progress + cost.computing + cost.communicating)
    return now + backward.end - progress


def choose_codecs(backward: BackwardPass, costs: Mapping[str, Sequence[Cost]], shares_core: bool) -> list[str]:
    """The codec of each bucket with which gradients arrive soonest.

    `costs`: of each bucket, by codec, those that lose less first; they are preferred where others save next to nothing.
    """

    def finish(names: Sequence[str]) -> float:
        return finish_time(backward, [costs[name][index] for index, name in enumerate(names)], shares_core)

    uniform = [[name] * len(backward.ready) for name in costs]
    soonest = min((_descend(names, list(costs), finish) for names in uniform), key=finish)
    if finish(soonest) > finish(uniform[0]) * (1 - WORTHWHILE):
        return uniform[0]
    enough = finish(soonest) * (1 + _NEGLIGIBLE)
    for index in range(len(soonest)):
        variants = ([*soonest[:index], name, *soonest[index + 1 :]] for name in costs)
        soonest = next(variant for variant in variants if finish(variant) <= enough)
    return soonest


def _descend(names: list[str], codecs: Sequence[str], finish: Callable[[Sequence[str]], float]) -> list[str]:
    """Changes one bucket at a time as long as that helps, from the last, which is waited for, to the first."""
    improved = True
    while improved:
        improved = False
        for index in reversed(range(len(names))):
            best = min(([*names[:index], name, *names[index + 1 :]] for name in codecs), key=finish)
            if finish(best) < finish(names) * (1 - 1e-9):
                names, improved = best, True
    return names
