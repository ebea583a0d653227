"""How ranks divide a model among them, and how many of its parameters each holds. Notation as in size.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hvdlm.config import ModelSection, ParallelSection
from hvdlm.config.parallel import DIVIDED_SCHEDULES, Schedule
from hvdlm.model.size import mlp_width, qkv_width


@dataclass(frozen=True)
class Layout:
    """The ranks of each axis of the mesh (`hvdlm.comm.mesh`), and what those of axis `shard` divide."""

    zero: int = 0  # stage of ZeRO: optimizer state (1), gradients (2) and parameters (3) are divided; 0: nothing is
    data: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    schedule: Schedule = "1f1b"  # of the pipeline
    chunks: int = 1  # parts of the model that each rank of the pipeline has, if the schedule is interleaved
    blocks: tuple[int, ...] = ()  # of each stage; empty: as many as others have, or one more

    @classmethod
    def of_mesh(cls, parallel: ParallelSection, shape: Mapping[str, int], stages: Sequence[int] = ()) -> Layout:
        """`shape`: how many ranks each axis has. `stages`: blocks of each stage; empty: by `parallel.split`."""
        axes = (shape["data"], shape["shard"], shape["tensor"], shape["pipeline"])
        counts = stages or parallel.blocks_of_stages
        blocks = tuple(sum(counts[rank :: shape["pipeline"]]) for rank in range(shape["pipeline"])) if counts else ()
        chunks = parallel.chunks if parallel.schedule == "interleaved" else 1
        return cls(parallel.shard, *axes, parallel.schedule, chunks, blocks)

    @property
    def ranks(self) -> int:
        """All of the job."""
        return self.batch_parts * self.tensor * self.pipeline

    @property
    def batch_parts(self) -> int:
        """Into how many parts a global batch is divided: ranks of one tensor or pipeline group share theirs."""
        return self.data * self.shard

    def __str__(self) -> str:
        parts = [f"ZeRO {self.zero} x {self.shard}"] if self.zero else []
        parts += [f"{axis} {size}" for axis in ("data", "tensor", "pipeline") if (size := getattr(self, axis)) > 1]
        parts += [self.schedule.replace("_", " ")] if self.pipeline > 1 and self.schedule != "1f1b" else []
        return ", ".join(parts) or "one rank"


ONE_RANK = Layout()


class Parameters(NamedTuple):
    """Numbers of a rank, by kind."""

    matrices: int  # of blocks: those that are multiplied in 16 bits
    embeddings: int  # of tokens and positions, and the output projection
    vectors: int  # norms and biases

    @property
    def total(self) -> int:
        return sum(self)


def block_parameters(config: ModelSection, layout: Layout) -> Parameters:
    """Of one block on one rank, of tensor ranks the one with most.

    They divide the rows of the query, key, value and up projections with their biases, the columns of the two
    projections into the residual stream, and the rows of embedding and output projection (Shoeybi et al. 2019,
    arXiv:1909.08053, section 3). All of them hold norms, the biases of the former two, and position embeddings.
    """
    width, hidden_width, tensor = config.width, mlp_width(config), layout.tensor
    expansions = 1 if config.activation == "gelu" else 2
    rows = (qkv_width(config), expansions * hidden_width)  # of what is divided by rows
    matrices = sum(-(-count // tensor) for count in rows) * width
    matrices += (-(-width // tensor) + -(-hidden_width // tensor)) * width
    vectors = 2 * width * (2 if config.norm == "layernorm" and config.bias else 1)
    if config.bias or config.qkv_bias:
        vectors += -(-rows[0] // tensor)
    if config.bias:
        vectors += -(-rows[1] // tensor) + 2 * width
    return Parameters(matrices, 0, vectors)


def stage_blocks(config: ModelSection, layout: Layout, stage: int) -> int:
    """Blocks of a rank of a pipeline stage."""
    if layout.blocks:
        return layout.blocks[stage]
    return config.layers // layout.pipeline + (stage < config.layers % layout.pipeline)


def stage_parameters(config: ModelSection, vocab_size: int, layout: Layout, stage: int) -> Parameters:
    """Of one rank of a pipeline stage, before ZeRO divides them.

    The first stage has the embeddings, the last one the last norm and the output projection, tied or not: where these
    are two stages, both hold the tied matrix.
    """
    block, count = block_parameters(config, layout), stage_blocks(config, layout, stage)
    embeddings, vectors = 0, count * block.vectors
    if stage == 0:
        embeddings += vocabulary_parameters(config, vocab_size, layout)
        embeddings += config.context_length * config.width if config.position == "learned" else 0
    if stage == layout.pipeline - 1:
        vectors += config.width * (2 if config.norm == "layernorm" and config.bias else 1)
        if stage > 0 or not config.tie_embeddings:
            embeddings += vocabulary_parameters(config, vocab_size, layout)
    return Parameters(count * block.matrices, embeddings, vectors)


def vocabulary_parameters(config: ModelSection, vocab_size: int, layout: Layout) -> int:
    """Of one rank's token embedding, or of its output projection."""
    return -(-vocab_size // layout.tensor) * config.width


def most_parameters(config: ModelSection, vocab_size: int, layout: Layout) -> int:
    """Of the rank with most of them, before ZeRO divides them."""
    return max(stage_parameters(config, vocab_size, layout, stage).total for stage in _end_stages(layout))


def stage_flops_per_token(config: ModelSection, vocab_size: int, layout: Layout, stage: int) -> float:
    """Floating-point operations of the forward pass of one rank of a stage, for one token of a full context.

    A third of `hvdlm.model.size.flops_per_token`, divided among ranks.
    """
    count = stage_blocks(config, layout, stage)
    flops = 2.0 * count * block_parameters(config, layout).matrices
    flops += 2 * count * config.width * config.context_length / layout.tensor
    if stage == layout.pipeline - 1:
        flops += 2 * vocabulary_parameters(config, vocab_size, layout)
    return flops


def micro_batches(global_batch_size: int, micro_batch_size: int, layout: Layout) -> int:
    """That one rank computes in a step, of the ranks with most."""
    return math.ceil(math.ceil(global_batch_size / layout.batch_parts) / micro_batch_size)


def micro_batches_held(count: int, layout: Layout, stage: int) -> float:
    """Of `count` micro-batches of a step, those whose activations a rank of a stage holds at once.

    A chunk's are a part of a micro-batch's. 1F1B and interleaved: Narayanan et al. 2021, arXiv:2104.04473, section 2.2;
    eager: Zhuang et al. 2023, arXiv:2211.05322, section 4.2; zero bubble, ZB-H1 and ZB-H2: Qi et al. 2024,
    arXiv:2401.10241, section 3.
    """
    ranks, chunks = layout.pipeline, layout.chunks
    most = {
        "gpipe": float(count),
        "1f1b": ranks - stage,
        "interleaved": (2 * (ranks - 1 - stage) + (chunks - 1) * ranks + 1) / chunks,
        "eager_1f1b": 2 * (ranks - stage) - 1,
        "zero_bubble": ranks,
        "zero_bubble_h2": 2 * ranks - 1,
    }
    return min(count, most[layout.schedule])


def bubble_share(layout: Layout) -> float:
    """Of the time that a rank waits for others with 1F1B, that it waits with the layout's schedule.

    Sources as of `micro_batches_held`; a third where backward passes are divided, if the forward pass, the gradients of
    inputs and those of weights take equally long.
    """
    if layout.schedule == "interleaved":
        return 1 / layout.chunks
    return 1 / 3 if layout.schedule in DIVIDED_SCHEDULES else 1.0


def _end_stages(layout: Layout) -> tuple[int, ...]:
    """The first stage and the last one, which hold more than those between them."""
    return (0, layout.pipeline - 1) if layout.pipeline > 1 else (0,)
