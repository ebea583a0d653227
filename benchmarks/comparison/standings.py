"""The figures of a race: medians over its rounds, each ratio between neighbours in time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from comparison.answers import TOLERANCE
from comparison.lineup import LIMIT, REFERENCE, is_faithful, is_ours
from comparison.race import Outcome
from comparison.turns import Turn


@dataclass(frozen=True)
class Standing:
    """A row of the table; None where there is nothing to tell. README.md defines each."""

    name: str
    tokens_per_second: float | None
    of_limit: float | None
    of_ddp: float | None
    exposed_seconds: float | None
    waited_seconds: float | None
    wire_bytes: float | None
    interface_bytes: float | None
    starts: int
    crashes: int


def standings(outcomes: Sequence[Outcome], tokens_a_step: int) -> list[Standing]:
    """One row a contestant, in their order."""
    turns = {outcome.name: outcome.turns for outcome in outcomes}
    limit, reference = turns[LIMIT], turns[REFERENCE]

    def row(outcome: Outcome) -> Standing:
        own = outcome.turns
        return Standing(
            name=outcome.name,
            tokens_per_second=_median([tokens_a_step / turn.step_seconds for turn in own if turn]),
            of_limit=_median(_by_round(own, limit, lambda a, b: b.step_seconds / a.step_seconds)),
            of_ddp=_median(_by_round(own, reference, lambda a, b: b.step_seconds / a.step_seconds)),
            exposed_seconds=_median(_by_round(own, limit, lambda a, b: a.step_seconds - b.step_seconds)),
            waited_seconds=_median([turn.waited_seconds for turn in own if turn]),
            wire_bytes=_median([turn.wire_bytes for turn in own if turn]),
            interface_bytes=_median([turn.interface_bytes for turn in own if turn]),
            starts=outcome.starts,
            crashes=len(outcome.crashes),
        )

    return [row(outcome) for outcome in outcomes]


def objections(outcomes: Sequence[Outcome]) -> list[str]:
    """Why these figures may not be used, in sentences."""
    found = []
    for outcome in outcomes:
        if is_ours(outcome.name) and outcome.crashes:
            found.append(f"{outcome.name} crashed: {outcome.crashes[0]}")
        elif is_faithful(outcome.name) and outcome.apart is not None and outcome.apart > TOLERANCE:
            found.append(
                f"{outcome.name} and {REFERENCE} have trained different models, which are {outcome.apart:.3f} of the "
                f"way apart after equal steps, and not below {TOLERANCE:g}"
            )
    return found


def _by_round(
    own: Sequence[Turn | None], others: Sequence[Turn | None], compare: Callable[[Turn, Turn], float]
) -> list[float]:
    return [compare(a, b) for a, b in zip(own, others, strict=True) if a is not None and b is not None]


def _median(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return statistics.median(told) if told else None
