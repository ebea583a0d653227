"""`[local_steps]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hvdlm.config.section import Section


class LocalStepsSection(Section):
    """`[local_steps]`: ranks train on their own for some steps, and average what they have learned."""

    every: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="steps of a rank from one average to the next; 0: gradients every step; auto: as few as hide an "
        "average on the link that is measured, with the overlap that this takes",
    )
    by: Literal["tokens", "seconds"] = Field(
        "tokens",
        description="tokens: every rank trains on its part of each batch; seconds: one that is slower than the fastest "
        "by more than a tenth leaves out steps, so that a round takes as long on each",
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="first steps of a run, whose gradients are combined every step, by the codec if it is none, fp16, "
        "bf16, int8 or int4, and by int4 otherwise",
    )
    lr: float = Field(1.0, gt=0, description="learning rate of the outer optimizer; 1: the average as it is")
    momentum: float = Field(0.0, ge=0, lt=1, description="Nesterov momentum of the outer optimizer")
    fragments: int = Field(1, gt=0, description="parts of the model, averaged one after the other within `every` steps")
    hierarchical: bool = Field(
        False, description="ranks of a node combine their gradients every step; local steps are those of a node"
    )
    overlap: int = Field(0, ge=0, description="steps that go on while a fragment is being averaged; at most `every`")
    merge: Literal["add", "mix"] = Field(
        "add",
        description="add: a rank's parameters become the averaged ones, and steps that it has made while these were on "
        "their way are added; mix: parts of both, by alpha",
    )
    alpha: float = Field(0.5, ge=0, le=1, description="share of a rank's own parameters where merge = 'mix'")

    @model_validator(mode="after")
    def _fits(self) -> LocalStepsSection:
        if self.every == "auto":
            if self.overlap:
                raise ValueError("local_steps.every = 'auto' chooses local_steps.overlap too: leave it out")
        elif self.every and self.overlap > self.every:
            raise ValueError(f"local_steps.overlap = {self.overlap} is more than local_steps.every = {self.every}")
        return self
