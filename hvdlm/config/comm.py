"""`[comm]` and `[compression]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hvdlm.config.section import Section


class CommSection(Section):
    """`[comm]`: how ranks communicate."""

    engine: Literal["auto", "solo", "horovod", "mpi", "torch"] = Field(
        "auto", description="communication library; auto: by how the job was started"
    )
    bucket_mb: float = Field(
        0.0, ge=0, description="gradient bytes sent at once, in units of 2**20; 0: what suits codec and hosts"
    )
    algorithm: Literal["auto", "ring", "engine"] = Field(
        "auto", description="what sums gradients: our ring, the engine's all-reduce, or whichever costs less at start"
    )
    timeout: float = Field(
        300.0,
        gt=0,
        le=1e6,
        description="seconds that a rank waits for another before the job ends with an error; those in which it is "
        "suspended itself do not count",
    )
    elastic: bool = Field(
        False,
        description="when a rank dies, the others go on without it; needs engine mpi and mpirun --with-ft ulfm, or "
        "horovodrun with a host-discovery script, where ranks can join, too",
    )
    min_ranks: int = Field(1, gt=0, description="with elastic, fewer ranks save and end the job")
    mirror_residuals: bool = Field(
        False,
        description="with elastic, each rank sends its residuals to the next one in every step: they outlive it",
    )


class CompressionSection(Section):
    """`[compression]`: how gradients are encoded."""

    codec: str = Field(
        "none",
        description="none, fp16, bf16, int8, int4, int2, topk, topk2, powersgd, auto, or FILE.py:CLASS of your own; "
        "masked: with local steps, so that no rank learns what another one has",
    )
    weights: Literal["none", "int8", "int4", "int2"] = Field(
        "none",
        description="with parallel.shard, how matrices come from their owners: what has changed of them, rounded, "
        "where ranks keep weights; in stage 3 the numbers themselves, by int8; none: in the precision of products",
    )
    candidates: str = Field(
        "none,fp16,int4",
        description="codecs among which auto chooses by measurement; those that cost loss only if listed",
    )
    hierarchical: bool = Field(False, description="the engine sums within a node, and the codec between nodes")
    error_feedback: bool = Field(True, description="what a codec did not deliver is added to the next step's gradients")
    density: float = Field(0.01, ge=1 / 256, le=1, description="share of a matrix's numbers that topk and topk2 send")
    warmup_steps: int = Field(
        0,
        ge=0,
        description="steps with dense gradients before topk, topk2, powersgd; the first two then thin out in as many",
    )
    matrix_rank: int = Field(4, gt=0, description="rank of the matrices by which powersgd approximates gradients")
