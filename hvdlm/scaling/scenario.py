"""What is to be forecast: so many ranks on such links, with one model and one codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hvdlm.config import CompressionSection, Config
from hvdlm.gradients.bucket import make_buckets
from hvdlm.gradients.codecs.choice import bucket_bytes
from hvdlm.model.size import flops_per_token
from hvdlm.model.transformer import Transformer
from hvdlm.scaling.point import Point

Shapes = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Scenario:
    """One step of a run. Every rank computes the same number of tokens."""

    ranks: int
    ranks_per_host: int
    machines: int  # whose cores the ranks share: one for each host, or for all that are emulated
    link: float | None  # bits/s between hosts, each way; None: that of the measurements
    burst: int  # bytes that a link carries at once after it was idle
    compression: CompressionSection
    buckets: Shapes  # of each one's parameters, in the order of sending
    full: tuple[float, ...]  # share of the backward pass after which each bucket is
    flops_per_token: float
    tokens: int  # of a rank in a step
    micro_batches: int = 1

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.ranks_per_host)

    @property
    def elements(self) -> list[int]:
        """Numbers in each bucket."""
        return [sum(torch.Size(shape).numel() for shape in bucket) for bucket in self.buckets]


def of_point(point: Point) -> Scenario:
    """What a point of a study has measured."""
    config = Config.model_validate(point.settings)
    share = -(-config.train.batch_size // point.ranks)
    return Scenario(
        point.ranks,
        point.place.ranks_per_host,
        point.machine.machines,
        point.place.link_bits_per_second,
        point.place.link_burst_bytes,
        config.compression,
        tuple(tuple(tuple(shape) for shape in bucket.shapes) for bucket in point.buckets),
        _full(_model(config, point.vocab_size), [len(bucket.shapes) for bucket in point.buckets]),
        flops_per_token(config.model, point.vocab_size),
        point.tokens_per_step // point.ranks,
        -(-share // config.train.micro_batch_size),
    )


def of_config(config: Config, vocab_size: int, ranks: int, ranks_per_host: int, link: float | None) -> Scenario:
    """What a run with these settings would be; its batch is that of one rank, which all ranks then have."""
    hosts = -(-ranks // ranks_per_host)
    nbytes = bucket_bytes(config.comm, config.compression, hosts)
    model = _model(config, vocab_size)
    with torch.device("meta"):
        buckets = make_buckets(dict(model.named_parameters()), nbytes)
    train = config.train
    return Scenario(
        ranks,
        ranks_per_host,
        hosts,
        link,
        0,
        config.compression,
        tuple(tuple(tuple(parameter.shape) for parameter in bucket.parameters) for bucket in buckets),
        _full(model, [len(bucket.parameters) for bucket in buckets]),
        flops_per_token(config.model, vocab_size),
        train.batch_size * config.model.context_length,
        -(-train.batch_size // train.micro_batch_size),
    )


def _model(config: Config, vocab_size: int) -> Transformer:
    """Its names and shapes, without its memory."""
    with torch.device("meta"):
        return Transformer(config.model, vocab_size)


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
