"""Stretches of time that gradients were on their way, for whoever draws or explains a step."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """What lasted from `begin` to `end`, both of time.perf_counter() in this process."""

    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def total_seconds(spans: list[Span]) -> float:
    """The lengths of all together."""
    return sum(span.seconds for span in spans)
