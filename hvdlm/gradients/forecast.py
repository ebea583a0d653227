"""When will the gradients of a step have arrived, if buckets travel by these codecs or by others?

A step is played in the mind: the backward pass fills one bucket after the other, the communication thread takes them in
that order, one at a time. Where that thread has no core of its own, what it computes holds up the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# What compression must win, of the whole, to be worth its loss: less is within the noise of measurement.
WORTHWHILE = 0.01
# What may be given away, of the whole, so that a bucket travels by a codec that loses less.
_NEGLIGIBLE = 0.002


class Cost(NamedTuple):
    """Seconds on the communication thread for a bucket that travels by a codec."""

    computing: float  # making and reading messages
    travelling: float  # sending them, and waiting for those of others


class BackwardPass(NamedTuple):
    """When, in seconds from its beginning, a backward pass that nothing holds up fills each bucket, and ends."""

    full: Sequence[float]  # ascending
    end: float


def arrival(backward: BackwardPass, costs: Sequence[Cost], shares_core: bool) -> float:
    """Seconds from the beginning of the backward pass until the last bucket has arrived.

    `costs`: of each bucket. `shares_core`: whether the communication thread and the backward pass take turns.
    """
    now = done = 0.0  # the time, and how far the backward pass would be by itself
    for full, cost in zip(backward.full, costs, strict=True):
        if full > done:
            now, done = now + full - done, full
        left = backward.end - done
        now += cost.computing + (min(left, cost.computing) if shares_core else 0.0)
        now += cost.travelling
        done = min(backward.end, done + cost.computing + cost.travelling)
    return now + backward.end - done


def choose(backward: BackwardPass, costs: Mapping[str, Sequence[Cost]], shares_core: bool) -> list[str]:
    """The codec of each bucket with which gradients arrive soonest.

    `costs`: of each bucket, by codec; what loses less comes first, and is taken where others win next to nothing.
    """

    def ends(names: Sequence[str]) -> float:
        return arrival(backward, [costs[name][index] for index, name in enumerate(names)], shares_core)

    uniform = [[name] * len(backward.full) for name in costs]
    soonest = min((_descend(names, list(costs), ends) for names in uniform), key=ends)
    if ends(soonest) > ends(uniform[0]) * (1 - WORTHWHILE):
        return uniform[0]
    enough = ends(soonest) * (1 + _NEGLIGIBLE)
    for index in range(len(soonest)):
        tries = ([*soonest[:index], name, *soonest[index + 1 :]] for name in costs)
        soonest = next(tried for tried in tries if ends(tried) <= enough)
    return soonest


def _descend(names: list[str], codecs: Sequence[str], ends: Callable[[Sequence[str]], float]) -> list[str]:
    """Changes one bucket at a time as long as that helps, beginning with the last, which is waited for."""
    improved = True
    while improved:
        improved = False
        for index in reversed(range(len(names))):
            tried = min(([*names[:index], name, *names[index + 1 :]] for name in codecs), key=ends)
            if ends(tried) < ends(names) * (1 - 1e-9):
                names, improved = tried, True
    return names
