"""Codec `masked`: the sum is right to its unit, nothing is lost, and what ranks send is random."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import torch
from checks import check
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.config import CommSection, CompressionSection
from hvdlm.gradients.channel import Channel, open_channels
from hvdlm.gradients.codecs.masked import Masked
from hvdlm.gradients.exchange import Exchange

UNIT = 2.0**-24
COUNT = 40_001  # numbers, which no number of ranks divides
# Pearson's sum of squares over the 256 values of a byte, of uniform ones: it is above this with probability 1e-9
MOST_UNEVEN = 255 + 6 * (2 * 255) ** 0.5 + 24


def open_exchange(comm: Communicator) -> tuple[list[Channel], Exchange]:
    settings = CommSection(), CompressionSection()
    channels = open_channels(comm, torch.device("cpu"), *settings, largest=COUNT)
    return channels, channels[0].exchange


def make_codec() -> Masked:
    bucket = SimpleNamespace(names=["weight"], buffer=torch.zeros(COUNT))
    return Masked(bucket, CompressionSection(codec="masked"))  # type: ignore[arg-type]


def unevenness(words: Tensor) -> float:
    counts = torch.bincount(words.view(torch.uint8).int(), minlength=256).double()
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


@check(sizes=[1, 2, 3, 4])
def check_sums(comm: Communicator) -> None:
    """Of small numbers at once, to half a unit a rank; of large ones in some rounds. Equal on all ranks."""
    channels, exchange = open_exchange(comm)
    codec = make_codec()
    generators = [torch.Generator().manual_seed(rank) for rank in range(comm.size)]
    made, delivered = torch.zeros(COUNT, dtype=torch.float64), torch.zeros(COUNT, dtype=torch.float64)
    for step in range(22):
        everyone = [torch.randn(COUNT, generator=generator) * 0.01 for generator in generators]
        for values in everyone:
            values[7] = 300.0 if step == 0 else 0.0  # more than a rank may send at once
            made += values.double()
        own = everyone[comm.rank].clone()
        codec.reduce_(own, exchange, step)
        assert all(torch.equal(own, other) for other in comm.all_gather(own))
        delivered += own.double()
        residuals = sum(each.double() for each in comm.all_gather(codec.state()["residual"]))
        assert (made - delivered - residuals).abs().max() < 1e-6
        error = (made - delivered).abs()
        error[7] = 0.0
        assert error.max() <= comm.size * UNIT / 2 + 1e-8 or comm.size == 1
    assert abs(float(delivered[7] - made[7])) < 1e-4
    for channel in channels:
        channel.close()


@check(sizes=[3, 4])
def check_messages_are_random(comm: Communicator) -> None:
    """Those of one rank, and their sum over all but one rank; and others each time. Without masks this test fails."""
    channels, exchange = open_exchange(comm)
    codec, sent = make_codec(), []
    original = exchange.all_to_all_v

    def recording(messages: list[Tensor], lengths: list[int]) -> list[Tensor]:
        sent.append(torch.cat(messages).view(torch.int32).clone())
        return original(messages, lengths)

    with patch.object(exchange, "all_to_all_v", recording):
        for step in range(2):
            codec.reduce_(torch.full((COUNT,), 0.5), exchange, step)
            with patch.object(codec, "_mask_", lambda *_: None):
                values = torch.full((COUNT,), 0.5)
                codec.reduce_(values, exchange, step)
                assert torch.equal(values, torch.full((COUNT,), 0.5 * comm.size))
    masked, plain = sent[0::2], sent[1::2]
    assert unevenness(plain[0]) > 1000 * MOST_UNEVEN
    everyone = comm.all_gather(masked[0])
    for words in (*masked, masked[0] - masked[1], everyone[0] - everyone[1]):
        assert unevenness(words) < MOST_UNEVEN
    for left_out in range(comm.size):
        others = [each for rank, each in enumerate(everyone) if rank != left_out]
        assert unevenness(torch.stack(others).sum(0, dtype=torch.int32)) < MOST_UNEVEN
    assert torch.equal(torch.stack(list(everyone)).sum(0, dtype=torch.int32), plain[0] * comm.size)
    for channel in channels:
        channel.close()
