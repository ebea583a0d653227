"""What is to be forecast: so many ranks on such links, with one model and one codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch

from hvdlm.config import CompressionSection, Config, ModelSection
from hvdlm.gradients.bucket import divide
from hvdlm.gradients.codecs.registry import AUTO, bucket_bytes
from hvdlm.model.size import flops_per_token
from hvdlm.model.transformer import Transformer
from hvdlm.scaling.point import Point

Shapes = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Scenario:
    """One step of a run, in which every rank computes as many tokens."""

    config: Config
    vocab_size: int
    ranks: int
    ranks_per_host: int
    machines: int  # whose cores the ranks share: one for each host, or for all that are emulated
    link: float | None  # bits/s between hosts, each way; None: that of the measurements
    burst: int  # bytes that a link carries at once after it was idle
    tokens: int  # of a rank in a step
    micro_batches: int
    buckets: Shapes = ()  # of each one's parameters, in the order of sending; none: those that suit the codec

    def __post_init__(self) -> None:
        if not self.buckets:
            object.__setattr__(self, "buckets", self._cut())

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.ranks_per_host)

    @property
    def compression(self) -> CompressionSection:
        return self.config.compression

    @cached_property
    def flops_per_token(self) -> float:
        """Of forward and backward pass."""
        return flops_per_token(self.config.model, self.vocab_size)

    @cached_property
    def full(self) -> tuple[float, ...]:
        """Share of the backward pass after which each bucket is full."""
        model = _model(self.config.model, self.vocab_size)
        return _full(model, [len(bucket) for bucket in self.buckets])

    @cached_property
    def elements(self) -> list[int]:
        """Numbers in each bucket."""
        return [sum(torch.Size(shape).numel() for shape in bucket) for bucket in self.buckets]

    def with_compression(self, **changes: Any) -> Scenario:
        """With other settings of compression, in buckets that suit the codec."""
        compression = self.compression.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"compression": compression}), buckets=())

    def _cut(self) -> Shapes:
        nbytes = bucket_bytes(self.config.comm, self.compression, self.hosts)
        groups = divide(dict(_model(self.config.model, self.vocab_size).named_parameters()), nbytes)
        return tuple(tuple(tuple(parameter.shape) for parameter in group.values()) for group in groups)


def of_point(point: Point) -> Scenario:
    """What a point of a study has measured: the step of the rank with the largest share of the batch."""
    config = Config.model_validate(point.settings)
    share = -(-config.train.global_batch_size // point.ranks)
    # Those of codec auto are of what it chose, which is to be forecast
    shapes = () if point.codec == AUTO else tuple(tuple(map(tuple, bucket.shapes)) for bucket in point.buckets)
    return Scenario(
        config,
        point.vocab_size,
        point.ranks,
        point.place.ranks_per_host,
        point.machine.machines,
        point.place.link_bits_per_second,
        point.place.link_burst_bytes,
        share * config.model.context_length,
        -(-share // config.train.micro_batch_size),
        shapes,
    )


def of_config(config: Config, vocab_size: int, ranks: int, ranks_per_host: int, link: float | None) -> Scenario:
    """What a run with these settings would be; its batch is that of one rank, which all ranks then have."""
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
    """Its names and shapes, without its memory; the same for all scenarios of a model."""
    with torch.device("meta"):
        return Transformer(section, vocab_size)


def _full(model: Transformer, counts: Sequence[int]) -> tuple[float, ...]:
    """Shares of the backward pass after which buckets of so many parameters, in reverse order, are full.

    A matrix takes time as it has numbers. An embedding takes none, but one that the output shares takes the output's,
    at the beginning, and has its gradient only when the pass ends.
    """
    names = list(reversed(list(model.named_parameters())))
    work = [0 if "embedding" in name else parameter.numel() for name, parameter in names]
    is_shared = not any(name.startswith("output.") for name, _ in names)
    done = [model.output_weight.numel() if is_shared else 0]
    for each in work:
        done.append(done[-1] + each)
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return tuple(done[end] / done[-1] for end in ends)
