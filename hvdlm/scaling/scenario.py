"""What is forecast: one step with a model and a codec on a number of ranks and links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from hvdlm.config import CompressionSection, Config, LocalStepsSection, ModelSection
from hvdlm.gradients.bucket import group_parameters
from hvdlm.gradients.codecs.registry import AUTO, bucket_bytes
from hvdlm.model.linear import Linear
from hvdlm.model.size import flops_per_token
from hvdlm.model.transformer import Transformer, without_memory
from hvdlm.scaling.point import Point
from hvdlm.strategies.local_steps.rounds import split_into_fragments

Shapes = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Scenario:
    """One step of a run in which every rank computes the same number of tokens."""

    config: Config
    vocab_size: int
    ranks: int
    ranks_per_host: int
    machines: int  # whose cores the ranks share: one per host, or one for all emulated hosts
    link: float | None  # bits/s of each host, each way; None: not known
    burst: int  # bytes that a link carries at once, above its rate, after it was idle
    tokens: int  # of a rank in a step
    micro_batches: int
    buckets: Shapes = ()  # by bucket, in the order of sending; empty: the buckets that hvdlm makes for the codec

    def __post_init__(self) -> None:
        if not self.buckets:
            object.__setattr__(self, "buckets", self._make_buckets())

    @property
    def hosts(self) -> int:
        """Hosts that the ranks need."""
        return -(-self.ranks // self.ranks_per_host)

    @property
    def compression(self) -> CompressionSection:
        """The settings of compression."""
        return self.config.compression

    @property
    def local_steps(self) -> LocalStepsSection | None:
        """Their settings; None: gradients of every step are summed."""
        return self.config.local_steps if self.config.local_steps.every else None

    @cached_property
    def fragments(self) -> list[list[int]]:
        """Which buckets are those of each fragment, with local steps."""
        counts = [len(groups) for groups in self._groups()]
        ends = [sum(counts[: index + 1]) for index in range(len(counts))]
        return [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]

    @cached_property
    def flops_per_token(self) -> float:
        """Of forward and backward pass."""
        return flops_per_token(self.config.model, self.vocab_size)

    @cached_property
    def ready(self) -> tuple[float, ...]:
        """The share of the backward pass after which each bucket is ready."""
        model = _model(self.config.model, self.vocab_size)
        return _ready_shares(model, [len(bucket) for bucket in self.buckets])

    @cached_property
    def elements(self) -> list[int]:
        """Numbers in each bucket."""
        return [sum(torch.Size(shape).numel() for shape in bucket) for bucket in self.buckets]

    @property
    def product_elements(self) -> int:
        """Numbers that only matrix products read, which may round them."""
        layers = (each for each in _model(self.config.model, self.vocab_size).modules() if isinstance(each, Linear))
        return sum(parameter.numel() for layer in layers for parameter in layer.parameters())

    def with_compression(self, **changes: Any) -> Scenario:
        """The same with other settings of compression, and the buckets that hvdlm makes for them."""
        compression = self.compression.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"compression": compression}), buckets=())

    def with_local_steps(self, **changes: Any) -> Scenario:
        """The same with other settings of local steps."""
        local_steps = self.config.local_steps.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"local_steps": local_steps}), buckets=())

    def _make_buckets(self) -> Shapes:
        groups = (group for groups in self._groups() for group in groups)
        return tuple(tuple(tuple(parameter.shape) for parameter in group.values()) for group in groups)

    def _groups(self) -> list[list[dict[str, nn.Parameter]]]:
        """The parameters of each bucket, of each fragment; without local steps the whole model is one."""
        nbytes = bucket_bytes(self.config.comm, self.compression, self.hosts)
        named = dict(_model(self.config.model, self.vocab_size).named_parameters())
        fragments = split_into_fragments(named, self.local_steps.fragments) if self.local_steps else [named]
        return [group_parameters(fragment, nbytes) for fragment in fragments]


def of_point(point: Point) -> Scenario:
    """The step that a point of a study measured, of the rank with the largest part of the batch."""
    config = Config.model_validate(point.settings)
    sequences = -(-config.train.global_batch_size // point.ranks)
    # Buckets of codec auto follow from its choice, which is forecast too, and those of local steps from their fragments
    shapes = (
        ()
        if point.codec == AUTO or point.has_local_steps
        else tuple(tuple(map(tuple, bucket.shapes)) for bucket in point.buckets)
    )
    return Scenario(
        config,
        point.vocab_size,
        point.ranks,
        point.place.ranks_per_host,
        point.machine.machines,
        point.place.link_bits_per_second,
        point.place.link_burst_bytes,
        sequences * config.model.context_length,
        -(-sequences // config.train.micro_batch_size),
        shapes,
    )


def of_config(config: Config, vocab_size: int, ranks: int, ranks_per_host: int, link: float | None) -> Scenario:
    """The step of a run with these settings, whose batch size is that of one rank."""
    train = config.train
    return Scenario(
        config,
        vocab_size,
        ranks,
        ranks_per_host,
        -(-ranks // ranks_per_host),
        link,
        0,
        train.global_batch_size * config.model.context_length,
        -(-train.global_batch_size // train.micro_batch_size),
    )


@cache
def _model(section: ModelSection, vocab_size: int) -> Transformer:
    """A model with names and shapes but without memory, shared by all scenarios of it."""
    return without_memory(section, vocab_size)


def _ready_shares(model: Transformer, counts: Sequence[int]) -> tuple[float, ...]:
    """The share of the backward pass after which each bucket is ready.

    `counts`: parameters of each bucket, which are in reverse order of the model's. Time is in proportion to a matrix's
    elements. An embedding takes none. One that is shared with the output takes the output's time at the start of the
    pass, and its gradient is complete only at the end.
    """
    names = list(reversed(list(model.named_parameters())))
    work = [0 if "embedding" in name else parameter.numel() for name, parameter in names]
    is_shared = not any(name.startswith("output.") for name, _ in names)
    done = [model.output_weight.numel() if is_shared else 0]
    for each in work:
        done.append(done[-1] + each)
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return tuple(done[end] / done[-1] for end in ends)
