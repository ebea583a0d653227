"""What is to be forecast: so many ranks on such links, with one model and one codec."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvdlm.config import CompressionSection, Config
from hvdlm.gradients.codecs.choice import bucket_bytes
from hvdlm.model.size import flops_per_token
from hvdlm.model.transformer import Transformer
from hvdlm.scaling.point import Point


@dataclass(frozen=True)
class Scenario:
    """One step of a run. Every rank computes the same number of tokens."""

    ranks: int
    ranks_per_host: int
    link: float | None  # bits/s between hosts, each way; None: that of the measurements
    compression: CompressionSection
    buckets: tuple[tuple[tuple[int, ...], ...], ...]  # shapes of each one's parameters, in the order of sending
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
        point.place.link_bits_per_second,
        config.compression,
        tuple(tuple(tuple(shape) for shape in bucket.shapes) for bucket in point.buckets),
        flops_per_token(config.model, point.vocab_size),
        point.tokens_per_step // point.ranks,
        -(-share // config.train.micro_batch_size),
    )


def of_config(config: Config, vocab_size: int, ranks: int, ranks_per_host: int, link: float | None) -> Scenario:
    """What a run with these settings would be; its batch is that of one rank, which all ranks then have."""
    hosts = -(-ranks // ranks_per_host)
    nbytes = bucket_bytes(config.comm, config.compression, hosts)
    train = config.train
    return Scenario(
        ranks,
        ranks_per_host,
        link,
        config.compression,
        bucket_shapes(config, vocab_size, nbytes),
        flops_per_token(config.model, vocab_size),
        train.batch_size * config.model.context_length,
        -(-train.batch_size // train.micro_batch_size),
    )


def bucket_shapes(config: Config, vocab_size: int, nbytes: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Of the model that these settings name, without its memory."""
    from hvdlm.gradients.bucket import make_buckets

    with torch.device("meta"):
        model = Transformer(config.model, vocab_size)
        buckets = make_buckets(dict(model.named_parameters()), nbytes)
    return tuple(tuple(tuple(parameter.shape) for parameter in bucket.parameters) for bucket in buckets)
