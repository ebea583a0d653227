"""`[checkpoint]` and `[log]`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from hvdlm.arguments import duration
from hvdlm.config.section import Section, check_duration


class CheckpointSection(Section):
    """`[checkpoint]`: when checkpoints are written, and how many are kept."""

    every: Annotated[int, Field(ge=0)] | Annotated[str, AfterValidator(check_duration)] = Field(
        "30min", description="steps between checkpoints, or time: 90s, 30min, 2h; 0: only at the end"
    )
    keep: int = Field(3, gt=0, description="newest checkpoints kept")
    keep_every: int = Field(0, ge=0, description="checkpoints of multiples of so many steps are kept, too; 0: of none")
    keep_best: bool = Field(
        False,
        description="each validation is preceded by a checkpoint; the one of the least loss is kept, and is `best`",
    )
    max_failures: int = Field(
        3,
        gt=0,
        description="checkpoints in a row that cannot be written before the job ends; a run's last one ends it alone",
    )

    @property
    def steps_between(self) -> int:
        """From one checkpoint to the next; 0 if that is not told in steps."""
        return self.every if isinstance(self.every, int) else 0

    @property
    def seconds_between(self) -> float:
        """From one checkpoint to the next; 0 if that is not told in time."""
        return 0.0 if isinstance(self.every, int) else duration(self.every)


class LogSection(Section):
    """`[log]`: how often metrics are written, and for whom."""

    every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(False, description="the same for TensorBoard, in `tensorboard` of the run directory")
    wandb: str = Field("", description="project of Weights & Biases that gets the same; empty: none")
