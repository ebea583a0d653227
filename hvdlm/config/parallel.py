"""`[parallel]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from hvdlm.config.section import Section

Schedule = Literal["gpipe", "1f1b", "eager_1f1b", "interleaved", "zero_bubble", "zero_bubble_h2"]
DIVIDED_SCHEDULES = ("zero_bubble", "zero_bubble_h2")  # which make gradients of weights apart from those of inputs


def check_split(text: str) -> str:
    """`text`, which is empty or numbers with commas between them; otherwise ValueError."""
    if text and not all(count.isascii() and count.isdigit() for count in text.split(",")):
        raise ValueError(f"{text!r} is not a list of numbers of blocks, such as 4,4,3")
    return text


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
    pipeline: int = Field(1, gt=0, description="ranks that divide the blocks among them, and pass on micro-batches")

    schedule: Schedule = Field(
        "1f1b",
        description="order of passes in a pipeline: all forward passes first; one forward, one backward; the same with "
        "more forward passes before, for links on which messages take time; with several chunks a rank; with gradients "
        "of weights made later, in the time in which ranks would wait; the same with more forward passes before",
    )
    chunks: int = Field(
        2, gt=1, description="parts of the model that each rank of a pipeline has, if `schedule` is interleaved"
    )
    split: Annotated[str, AfterValidator(check_split)] = Field(
        "",
        description="blocks of each stage of a pipeline, as in 4,4,3; with chunks, stages go round the ranks; empty: "
        "so that embedding, blocks and loss cost all stages as much as possible the same",
    )
    boundary: Literal["fp32", "bf16", "int8"] = Field(
        "fp32", description="numbers of activations and their gradients between the stages of a pipeline"
    )

    @property
    def stages(self) -> int:
        """Of the pipeline, each a chunk of a rank."""
        return self.pipeline * (self.chunks if self.schedule == "interleaved" else 1)

    @property
    def divides_backward_passes(self) -> bool:
        """Whether gradients of weights are made apart from those of inputs."""
        return self.schedule in DIVIDED_SCHEDULES

    @property
    def blocks_of_stages(self) -> list[int]:
        """`split` as numbers."""
        return [int(count) for count in self.split.split(",")] if self.split else []

    @property
    def is_used(self) -> bool:
        """Whether any rank holds less than the whole model, its gradients and its optimizer state."""
        return self.shard > 0 or self.tensor > 1 or self.pipeline > 1
