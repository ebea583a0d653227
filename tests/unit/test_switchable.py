"""A codec that is switched: no residual is lost, and one can be restored from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import CompressionSection
from hvdlm.gradients.auto.switchable import SwitchableCodec
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.exchange import Exchange

EXCHANGE = Exchange(SoloCommunicator(), None, [])
SIZE = 128


def switchable(name: str) -> SwitchableCodec:
    bucket = Bucket({"weight": nn.Parameter(torch.zeros(SIZE, SIZE))})
    return SwitchableCodec(name, bucket, CompressionSection(density=0.25))


def gradients() -> torch.Tensor:
    """Whole numbers below 2048: fp16 holds them exactly, so every sum below is exact."""
    return torch.randint(-500, 500, (SIZE * SIZE,), generator=torch.Generator().manual_seed(1)).float()


@pytest.mark.parametrize("names", [["topk", "none"], ["topk", "fp16", "none"], ["topk", "none", "topk", "none"]])
def test_the_residual_is_delivered_by_the_next_codec(names: list[str]) -> None:
    codec = switchable(names[0])
    delivered = torch.zeros(SIZE * SIZE)
    for step, name in enumerate(names):
        codec.switch_to(name)
        values = gradients()
        codec.reduce_(values, EXCHANGE, step)
        delivered += values
        if step == 0:
            assert codec.state()["residual"].any()
            assert not torch.equal(delivered, gradients())
    assert torch.equal(delivered, gradients() * len(names))
    assert not codec.state()["residual"].any()


def test_a_saved_residual_is_delivered_by_a_codec_that_has_none() -> None:
    codec = switchable("none")
    codec.state()["residual"].fill_(3.0)
    values = gradients()
    codec.reduce_(values, EXCHANGE, 0)
    assert torch.equal(values, gradients() + 3)
    values = gradients()
    codec.reduce_(values, EXCHANGE, 1)
    assert torch.equal(values, gradients())


def test_it_stays_what_it_is() -> None:
    codec = switchable("topk")
    codec.reduce_(gradients(), EXCHANGE, 0)
    residual = codec.state()["residual"]
    codec.switch_to("topk")
    assert codec.state()["residual"].data_ptr() == residual.data_ptr()
