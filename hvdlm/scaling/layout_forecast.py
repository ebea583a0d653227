"""The forecast of a step of a model that ranks divide among them (ZeRO, tensor, pipeline), by formula.

    step = micro-batches of the slowest stage + bubble + exposed gathers and reductions + optimizer

A micro-batch is its arithmetic at the rate that a rank attains, and its tensor all-reduces, which nothing hides.
The bubble is what other stages take for one micro-batch (1F1B: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1),
and the messages between stages while the pipeline fills and drains. ZeRO's gathers and reductions (Rajbhandari et al.
2020, arXiv:1910.02054, section 7) go on beside passes; exposed is what is longer than the pass, and one block's part.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdlm.config import Algorithm, ModelSection, Precision
from hvdlm.model.layout import (
    Layout,
    micro_batches,
    most_parameters,
    stage_blocks,
    stage_flops_per_token,
    stage_parameters,
)
from hvdlm.model.size import flops_per_token
from hvdlm.scaling.cluster import Cluster

# Bytes of a parameter that an optimizer's step moves: gradient and master weight are read, the latter is written, and
# each moment is read and written
_OPTIMIZER_BYTES: dict[Algorithm, int] = {"adamw": 28, "adam": 28, "dion": 28, "muon": 28, "sgd": 20, "lion": 20}


@dataclass(frozen=True)
class LayoutScenario:
    """One step of a model in a layout."""

    model: ModelSection
    vocab_size: int
    layout: Layout
    global_batch_size: int  # sequences
    micro_batch_size: int
    precision: Precision = "bf16"
    algorithm: Algorithm = "adamw"
    recomputed: float = 0.0  # of a forward pass, once more in the backward pass; 1: activation checkpointing
    gradient_bytes: float = 4.0  # that are sent for a number: 4 by codec none, 2 by fp16 and bf16
    bubble_share: float = 1.0  # of 1F1B's bubble: 1/3 for zero-bubble, 1 / v for v interleaved parts of each stage

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


@dataclass(frozen=True)
class LayoutForecast:
    """Seconds of one step by part."""

    compute: float  # of the slowest stage
    tensor: float  # its all-reduces between tensor ranks
    bubble: float  # waiting for other stages
    exposed: float  # gathers and reductions of ZeRO and of data-parallel groups that no pass hides
    optimizer: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.tensor + self.bubble + self.exposed + self.optimizer


def forecast_layout(scenario: LayoutScenario, cluster: Cluster) -> LayoutForecast:
    """Forecasts the step of a scenario."""
    count = scenario.micro_batches
    stages = [_Stage(scenario, cluster, index) for index in range(scenario.layout.pipeline)]
    slowest = max(stages, key=lambda stage: stage.seconds)
    others = sum(stage.seconds for stage in stages) - slowest.seconds
    filling = 2 * (len(stages) - 1) * _boundary_seconds(scenario, cluster)
    exposed, optimizer = _exposed_and_optimizer(scenario, cluster, slowest, count)
    return LayoutForecast(
        count * slowest.compute,
        count * slowest.tensor,
        scenario.bubble_share * (others + filling),
        exposed,
        optimizer,
    )


def utilisation(scenario: LayoutScenario, seconds: float, peak: float) -> float:
    """Model FLOPs of a step over what all ranks could compute in `seconds` at `peak` FLOP/s each."""
    flops = flops_per_token(scenario.model, scenario.vocab_size) * scenario.tokens
    return flops / (seconds * peak * scenario.layout.ranks)


class _Stage:
    """Seconds of a pipeline stage for one micro-batch."""

    def __init__(self, scenario: LayoutScenario, cluster: Cluster, index: int) -> None:
        model, layout = scenario.model, scenario.layout
        tokens = scenario.micro_batch_size * model.context_length
        self.blocks = stage_blocks(model, layout, index)
        self.numbers = stage_parameters(model, scenario.vocab_size, layout, index).total
        forward = tokens * stage_flops_per_token(model, scenario.vocab_size, layout, index) / cluster.flops
        reduction = cluster.ring(
            2 * (layout.tensor - 1) / layout.tensor * scenario.item * tokens * model.width, layout.tensor, 1
        )
        reductions = 2 * self.blocks * reduction  # of a pass; with sequence parallelism as many bytes (Korthikanti 2022)
        repeated = 1 + scenario.recomputed
        self.compute = forward * (2 + repeated)
        self.tensor = reductions * (1 + repeated)
        self.forward = forward + reductions
        self.backward = self.compute + self.tensor - self.forward

    @property
    def seconds(self) -> float:
        return self.compute + self.tensor


def _boundary_seconds(scenario: LayoutScenario, cluster: Cluster) -> float:
    """Seconds of the message of a micro-batch from one stage to the next."""
    layout = scenario.layout
    if layout.pipeline == 1:
        return 0.0
    nbytes = scenario.item * scenario.micro_batch_size * scenario.model.context_length * scenario.model.width
    return cluster.message(nbytes, layout.ranks // layout.pipeline)


def _exposed_and_optimizer(
    scenario: LayoutScenario, cluster: Cluster, stage: _Stage, count: int
) -> tuple[float, float]:
    """Seconds of what a rank of `stage` exchanges with those of other parts of the batch and no pass hides; and of its
    optimizer's step.
    """
    layout = scenario.layout
    shard_stride, data_stride = layout.tensor, layout.tensor * layout.shard
    kept = (layout.shard - 1) / layout.shard
    reduction = cluster.ring(kept * scenario.gradient_bytes * stage.numbers, layout.shard, shard_stride)
    gather = cluster.ring(kept * scenario.item * stage.numbers, layout.shard, shard_stride)
    across = cluster.ring(
        2 * (layout.data - 1) / layout.data * scenario.gradient_bytes * stage.numbers / layout.shard,
        layout.data,
        data_stride,
    )

    def beside(seconds: float, hidden_by: float) -> float:
        """Exposed: one block's part, and what is longer than the pass."""
        return max(seconds - hidden_by, seconds / stage.blocks)

    last = beside(reduction + across, stage.backward)  # of the last micro-batch, after which the sums are complete
    before = 0.0
    if layout.zero == 3:
        before = beside(gather, stage.forward) + beside(reduction + gather, stage.backward)
        last = beside(gather, stage.forward) + beside(reduction + gather + across, stage.backward)
    elif layout.zero == 2:
        before = beside(reduction, stage.backward)
    after = gather if layout.zero in (1, 2) else 0.0
    numbers = most_parameters(scenario.model, scenario.vocab_size, layout) / (layout.shard if layout.zero else 1)
    optimizer = _OPTIMIZER_BYTES[scenario.algorithm] * numbers / cluster.memory_bandwidth
    return (count - 1) * before + last + after, optimizer
