"""The forecast of a step of a model that ranks divide among them (ZeRO, tensor, pipeline), by formula.

    step = micro-batches of the slowest stage + bubble + exposed gathers and reductions + optimizer

A micro-batch is its arithmetic at the rate that a rank attains, and its tensor all-reduces, which nothing hides.
The bubble is what other stages take for one micro-batch (1F1B: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1),
and the messages between stages while the pipeline fills and drains. In between, a stage goes on with a new micro-batch
when one of those under way has come back from all stages after it: where few are under way that takes longer than
passes, and ranks wait for messages. ZeRO's gathers and reductions (Rajbhandari et al. 2020, arXiv:1910.02054, section
7) go on beside passes, block by block; exposed is what is longer than the pass, and one block's part; on a CPU also
what the cores, which compute meanwhile, take to send and receive. Stages 1 and 2 gather weights beside the forward pass
that follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hvdlm.config import ModelSection, Precision
from hvdlm.model.layout import (
    ONE_RANK,
    Layout,
    block_parameters,
    bubble_share,
    micro_batches,
    micro_batches_held,
    most_parameters,
    stage_blocks,
    stage_flops_per_token,
    stage_parameters,
)
from hvdlm.model.memory import saved_token_bytes
from hvdlm.model.size import flops_per_token, mlp_width
from hvdlm.scaling.cluster import Cluster

# Of a forward pass, once more in the backward pass: "block" as train.activation_checkpointing does
Recomputation = Literal["none", "half", "block", "whole"]

# What a block keeps for its backward pass is written and read in the forward pass; the backward pass reads it, and
# writes and reads its gradient
_MOVED_FORWARD, _MOVED_BACKWARD = 2, 3


@dataclass(frozen=True)
class LayoutScenario:
    """One step of a model in a layout."""

    model: ModelSection
    vocab_size: int
    layout: Layout
    global_batch_size: int  # sequences
    micro_batch_size: int
    precision: Precision = "bf16"
    recomputed: Recomputation = "none"
    plain_attention: bool = False  # attention as products of whole matrices, as before FlashAttention
    gradient_bytes: float = 4.0  # that are sent for a number: 4 by codec none, 2 by fp16 and bf16

    @property
    def item(self) -> int:
        """Bytes of a number in matrix products, and of weights that are gathered."""
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.global_batch_size * self.model.context_length

    @property
    def micro_batches(self) -> int:
        """That one rank computes in a step."""
        return micro_batches(self.global_batch_size, self.micro_batch_size, self.layout)

    @property
    def micro_batch_tokens(self) -> float:
        """Of one of them; a mean, for the last may be smaller."""
        sequences = math.ceil(self.global_batch_size / self.layout.batch_parts)
        return sequences / self.micro_batches * self.model.context_length


@dataclass(frozen=True)
class LayoutForecast:
    """Seconds of one step by part."""

    compute: float  # of the slowest stage
    tensor: float  # its all-reduces between tensor ranks
    bubble: float  # waiting for other stages, and for messages from them
    exposed: float  # gathers and reductions of ZeRO and of data-parallel groups that no pass hides
    optimizer: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.tensor + self.bubble + self.exposed + self.optimizer


def forecast_layout(scenario: LayoutScenario, cluster: Cluster) -> LayoutForecast:
    """Forecasts the step of a scenario."""
    count = scenario.micro_batches
    stages = _stages(scenario, cluster)
    slowest = max(stages, key=lambda stage: stage.seconds)
    others = sum(stage.seconds for stage in stages) - slowest.seconds
    travel = 2 * (len(stages) - 1) * _boundary_seconds(scenario, cluster)
    under_way = micro_batches_held(count, scenario.layout, 0)
    # From the first stage to the last and back, over what is under way meanwhile: at least so long for each micro-batch
    interval = (slowest.seconds + others + travel) / under_way
    exposed, optimizer = _exposed_and_optimizer(scenario, cluster, slowest, count)
    return LayoutForecast(
        count * slowest.compute,
        count * slowest.tensor,
        bubble_share(scenario.layout) * (others + travel) + (count - under_way) * max(0.0, interval - slowest.seconds),
        exposed,
        optimizer,
    )


def moved_bytes_per_token(model: ModelSection, precision: Precision) -> float:
    """That one rank alone reads and writes in its memory between matrix products, for one token."""
    saved = saved_token_bytes(model, precision, "cuda", False, ONE_RANK)
    return (_MOVED_FORWARD + _MOVED_BACKWARD) * model.layers * saved


def utilisation(scenario: LayoutScenario, seconds: float, peak: float) -> float:
    """Model FLOPs of a step over what all ranks could compute in `seconds` at `peak` FLOP/s each."""
    flops = flops_per_token(scenario.model, scenario.vocab_size) * scenario.tokens
    return flops / (seconds * peak * scenario.layout.ranks)


def _stages(scenario: LayoutScenario, cluster: Cluster) -> list[_Stage]:
    """All stages; those between the first and the last that have as many blocks are one object."""
    last, made = scenario.layout.pipeline - 1, {}
    kinds = [
        (stage_blocks(scenario.model, scenario.layout, index), index == 0, index == last) for index in range(last + 1)
    ]
    for index, kind in enumerate(kinds):
        if kind not in made:
            made[kind] = _Stage(scenario, cluster, index)
    return [made[kind] for kind in kinds]


class _Stage:
    """Seconds of a pipeline stage for one micro-batch."""

    def __init__(self, scenario: LayoutScenario, cluster: Cluster, index: int) -> None:
        model, layout = scenario.model, scenario.layout
        tokens = scenario.micro_batch_tokens
        self.blocks = stage_blocks(model, layout, index)
        self.numbers = stage_parameters(model, scenario.vocab_size, layout, index).total
        flops = tokens * stage_flops_per_token(model, scenario.vocab_size, layout, index)
        saved = tokens * self.blocks * saved_token_bytes(model, scenario.precision, "cuda", False, layout)
        if scenario.plain_attention:  # products over all pairs of tokens, and probabilities before and after dropout
            flops += tokens * 2 * self.blocks * model.width * model.context_length / layout.tensor
            saved += tokens * self.blocks * model.heads / layout.tensor * model.context_length * (2 * scenario.item + 1)
        products, moved = flops / cluster.flops, saved / cluster.memory_bandwidth
        # As many bytes as what sequence parallelism gathers and reduces (Korthikanti et al. 2022, arXiv:2205.05198).
        # MPI adds no 16-bit numbers: on CPUs they are sent as float32
        item = 4 if cluster.device == "cpu" else scenario.item
        reduction = cluster.reduction(item * tokens * model.width, layout.tensor, 1)
        forward = products + _MOVED_FORWARD * moved
        repeated, repeated_reductions = _recomputed(scenario)
        self.compute = (1 + repeated) * forward + 2 * products + _MOVED_BACKWARD * moved
        # Those of the embedding's forward and the output projection's backward pass
        ends = (index == 0) + (index == layout.pipeline - 1)
        self.tensor = (self.blocks * (4 + repeated_reductions) + ends) * reduction
        self.forward = forward + 2 * self.blocks * reduction
        self.backward = self.compute + self.tensor - self.forward

    @property
    def seconds(self) -> float:
        return self.compute + self.tensor


def _recomputed(scenario: LayoutScenario) -> tuple[float, int]:
    """The share of a forward pass that the backward pass repeats, and of a block's two all-reduces how many."""
    if scenario.recomputed == "none":
        return 0.0, 0
    if scenario.recomputed == "whole":
        return 1.0, 2
    if scenario.recomputed == "half":
        return 0.5, 1
    # PyTorch's checkpoint stops when it has all that the backward pass needs: before the MLP's second product
    block = block_parameters(scenario.model, ONE_RANK)
    return 1 - scenario.model.width * mlp_width(scenario.model) / block.matrices, 1


def _boundary_seconds(scenario: LayoutScenario, cluster: Cluster) -> float:
    """Seconds of the message of a micro-batch from one stage to the next, in fp32."""
    layout = scenario.layout
    if layout.pipeline == 1:
        return 0.0
    nbytes = 4 * scenario.micro_batch_tokens * scenario.model.width
    return cluster.message(nbytes, layout.ranks // layout.pipeline)


@dataclass(frozen=True)
class _Message:
    """What ranks exchange beside a pass."""

    seconds: float
    core_seconds: float  # of `seconds`, for which it keeps the rank from computing

    def __add__(self, other: _Message) -> _Message:
        return _Message(self.seconds + other.seconds, self.core_seconds + other.core_seconds)


def _exposed_and_optimizer(
    scenario: LayoutScenario, cluster: Cluster, stage: _Stage, count: int
) -> tuple[float, float]:
    """Seconds of what a rank of `stage` exchanges with those of other parts of the batch and no pass hides; and of its
    optimizer's step.
    """
    layout = scenario.layout
    shard_stride, data_stride = layout.tensor, layout.tensor * layout.shard

    def message(nbytes: float, ranks: int, stride: int) -> _Message:
        seconds = cluster.gather(nbytes, ranks, stride, stage.blocks)
        return _Message(seconds, cluster.gather_core_seconds(nbytes, ranks, stride))

    reduction = message(scenario.gradient_bytes * stage.numbers, layout.shard, shard_stride)
    gather = message(scenario.item * stage.numbers, layout.shard, shard_stride)
    half_across = message(scenario.gradient_bytes * stage.numbers / layout.shard, layout.data, data_stride)
    across = half_across + half_across

    def beside(messages: _Message, pass_seconds: float) -> float:
        """Exposed of messages that go on beside the pass of all blocks but one, the first or the last: what is longer,
        or, where the pass is, that block's part, and what cores take of all others.
        """
        most = 1 - 1 / stage.blocks
        return max(messages.seconds - most * pass_seconds, (1 - most) * messages.seconds + most * messages.core_seconds)

    last = beside(reduction + across, stage.backward)  # of the last micro-batch, after which the sums are complete
    before = 0.0
    if layout.zero == 3:
        before = beside(gather, stage.forward) + beside(reduction + gather, stage.backward)
        last = beside(gather, stage.forward) + beside(reduction + gather + across, stage.backward)
    elif layout.zero == 2:
        before = beside(reduction, stage.backward)
    after = beside(gather, stage.forward) if layout.zero in (1, 2) else 0.0
    numbers = most_parameters(scenario.model, scenario.vocab_size, layout) / (layout.shard if layout.zero else 1)
    return (count - 1) * before + last + after, numbers * cluster.optimizer_seconds
