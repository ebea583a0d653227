"""`[parallel]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hvdlm.config.section import Section


class ParallelSection(Section):
    """`[parallel]`: how the ranks of a job share a model, where one rank does not hold all of it."""

    shard: Literal[0, 1, 2, 3] = Field(
        0,
        description="ZeRO stage: ranks divide among them the optimizer's state (1), the gradients, too (2), the "
        "parameters, too (3); 0: each rank has all",
    )
    data: int = Field(
        0,
        ge=0,
        description="groups of ranks that each hold the whole model among them and train on their own part of a batch; "
        "0: one with `shard`, and as many as there are ranks for without",
    )
    tensor: int = Field(1, gt=0, description="ranks that divide each matrix of a block among them")
    sequence: bool = Field(
        False,
        description="the ranks of `tensor` divide the tokens of a sequence between attention and MLP, where otherwise "
        "each has the activations of all: less memory for the same bytes sent",
    )
    pipeline: int = Field(1, gt=0, description="ranks that divide the blocks among them, each having consecutive ones")

    @property
    def is_used(self) -> bool:
        """Whether any rank holds less than the whole model, its gradients and its optimizer state."""
        return self.shard > 0 or self.tensor > 1 or self.pipeline > 1
