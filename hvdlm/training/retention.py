"""Which checkpoints of a run are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Retention:
    """The `newest`, those of multiples of `every` steps, and the one of the least validation loss."""

    newest: int
    every: int = 0  # 0: none for that reason
    losses: Mapping[int, float] = field(default_factory=dict)  # of steps that were validated; empty: no best one

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Those of the saved `steps` that stay."""
        ordered = sorted(steps)
        kept = set(ordered[-self.newest :])
        if self.every:
            kept |= {step for step in ordered if step % self.every == 0}
        best = self.best(ordered)
        return kept if best is None else kept | {best}

    def best(self, steps: Iterable[int]) -> int | None:
        """The one of the saved `steps` with the least loss, of equal ones the first; None if none was validated."""
        validated = [step for step in sorted(steps) if step in self.losses]
        return min(validated, key=lambda step: self.losses[step], default=None)
