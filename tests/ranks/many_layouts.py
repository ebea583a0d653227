"""Layouts of up to four ranks, and what may become of a run's state from one to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RANKS = 4  # of the job; the first of them are those of a layout

# By name: ranks, and [parallel]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"{ranks} with all": (ranks, {}) for ranks in (1, 2, 3)},
    **{f"stage {stage} on {ranks}": (ranks, {"shard": stage}) for stage in (1, 2, 3) for ranks in (2, 3)},
    "stage 2 on 2 times 2": (4, {"shard": 2, "data": 2}),
    "2 tensor ranks": (2, {"tensor": 2}),
    "2 stages": (2, {"pipeline": 2}),
    "2 tensor ranks in stage 1": (4, {"tensor": 2, "shard": 1}),
    "2 stages in stage 1": (4, {"pipeline": 2, "shard": 1}),
    "2 tensor ranks in 2 stages": (4, {"tensor": 2, "pipeline": 2}),
}

# Muon's momentum is of matrices alone, and goes with no tensor ranks
OF_MUON = ("1 with all", "stage 1 on 3", "stage 3 on 2", "stage 2 on 2 times 2", "2 stages")


@dataclass(frozen=True)
class Change:
    """One layout has saved, another one has read that and saved again."""

    saved_by: str
    read_by: str
    is_equal: bool  # parameters, moments, step counts and moving averages, bit for bit
    residuals: bool  # whether what ranks had not delivered is still there: of each rank, or in sum

    @property
    def keeps_residuals(self) -> bool:
        """Whether they have to be: residuals of a part of the model are no other layout's."""
        return not (_divides_model(self.saved_by) or _divides_model(self.read_by))


def _divides_model(layout: str) -> bool:
    _, parallel = LAYOUTS[layout]
    return "tensor" in parallel or "pipeline" in parallel
