"""Which part of a model a rank holds, where no rank holds all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STEP = "step"  # how often a parameter was stepped: a number that goes with its first element


@dataclass(frozen=True)
class Layout:
    """What this rank holds of parameters, and of what is kept in their shape: moments, averages.

    State is named by its kind and its parameter, "exp_avg.blocks.0.mlp.up.weight".
    """

    shapes: Mapping[str, tuple[int, ...]]  # of all parameters, by name
    spans: Mapping[str, tuple[int, int]]  # of the flattened parameters of which this rank holds something
    kinds: tuple[str, ...]  # of state, STEP among them where steps are counted

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all state, by name."""
        return {
            f"{kind}.{name}": () if kind == STEP else shape
            for kind in self.kinds
            for name, shape in self.shapes.items()
        }

    def span(self, name: str) -> tuple[int, int] | None:
        """What this rank holds of a parameter or of state: from where to where in the flattened tensor."""
        if name in self.shapes:
            return self.spans.get(name)
        kind, _, parameter = name.partition(".")
        span = self.spans.get(parameter)
        if kind == STEP and span is not None:
            return (0, 1)
        return span

    def writes(self, name: str) -> bool:
        """Whether it is this rank that saves what it holds of a parameter or of state."""
        kind, _, parameter = name.partition(".")
        if name not in self.shapes and kind == STEP:
            return parameter in self.spans and self.spans[parameter][0] == 0
        return self.span(name) is not None
