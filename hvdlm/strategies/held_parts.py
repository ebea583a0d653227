"""Which parts of a model a rank holds, where no rank holds all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

STEP = "step"  # how often a parameter was stepped: one number, which goes with its first element

Runs = Sequence[tuple[int, int]]  # from where to where, in a flattened tensor


def with_positions(runs: Runs) -> Iterator[tuple[int, int, int]]:
    """Of each run its start and stop, and where it begins among the numbers of all of them, one behind the other."""
    position = 0
    for start, stop in runs:
        yield start, stop, position
        position += stop - start


@dataclass(frozen=True)
class HeldParts:
    """What this rank holds of parameters, and of what is kept in their shape: moments, averages.

    Each lies in a tensor of its own, whose numbers are those of some runs of the flattened whole, one behind the other.
    State is named by its kind and its parameter, "exp_avg.blocks.0.mlp.up.weight".
    """

    shapes: Mapping[str, tuple[int, ...]]  # of all parameters, by name
    runs: Mapping[str, Runs]  # of those of which this rank holds something
    kinds: Mapping[str, Sequence[str]]  # of each parameter: of its state, STEP among them where steps are counted
    saved: frozenset[str]  # of those, which it is this rank, of all that hold the same, that saves

    def with_kind(self, kind: str) -> HeldParts:
        """The same with one more kind of state of each parameter."""
        return replace(self, kinds={name: (*kinds, kind) for name, kinds in self.kinds.items()})

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all state, by name."""
        return {
            f"{kind}.{name}": () if kind == STEP else shape
            for name, shape in self.shapes.items()
            for kind in self.kinds[name]
        }

    def runs_of(self, name: str) -> Runs:
        """The runs that this rank holds of a parameter or of state; empty if it holds nothing."""
        if name in self.shapes:
            return self.runs.get(name, ())
        kind, _, parameter = name.partition(".")
        runs = self.runs.get(parameter, ())
        return [(0, 1)] if runs and kind == STEP else runs

    def saves(self, name: str) -> bool:
        """Whether it is this rank that saves what it holds of a parameter or of state."""
        kind, _, rest = name.partition(".")
        parameter = name if name in self.shapes else rest
        is_count = parameter != name and kind == STEP
        return parameter in self.saved and (not is_count or self.runs[parameter][0][0] == 0)
