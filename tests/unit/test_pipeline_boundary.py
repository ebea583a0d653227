"""Messages between stages: what they hold, and by how much it is rounded."""

from __future__ import annotations

import pytest
import torch

from hvdlm.parallel.pipeline.boundary import Boundary, decode, empty_message, encode

SHAPE = (2, 3, 5)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("boundary", "nbytes"), [("fp32", 4 * 30), ("bf16", 2 * 30), ("int8", 30 + 4 * 6)])
def test_bytes_and_back(boundary: Boundary, nbytes: int) -> None:
    tensor = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).transpose(0, 1).contiguous().transpose(0, 1)
    message, room = encode(tensor, boundary), empty_message(SHAPE, boundary, CPU)
    assert (message.shape, message.dtype) == (room.shape, room.dtype)
    assert message.is_contiguous()
    assert message.nbytes == nbytes
    back = decode(message, boundary)
    assert back.dtype == torch.float32
    if boundary == "fp32":
        assert torch.equal(back, tensor)
    elif boundary == "bf16":
        assert torch.equal(back, tensor.bfloat16().float())
    else:  # to half a unit, of which 127 are the largest number of the token
        unit = tensor.abs().amax(dim=-1, keepdim=True) / 127
        assert ((back - tensor).abs() <= unit * 0.501).all()
        assert not torch.equal(back, tensor)


def test_int8_by_hand() -> None:
    tensor = torch.tensor([[[127.0, -1.4, 0.6], [0.0, 0.0, 0.0], [-2.54, 1.27, 0.0]]])
    expected = torch.tensor([[[127.0, -1.0, 1.0], [0.0, 0.0, 0.0], [-2.54, 1.28, 0.0]]])
    assert torch.allclose(decode(encode(tensor, "int8"), "int8"), expected, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_number_that_is_not_finite_is_not_lost(bad: float) -> None:
    """Of int8 the whole token becomes NaN, and no other."""
    tensor = torch.ones(SHAPE)
    tensor[0, 1, 2] = bad
    back = decode(encode(tensor, "int8"), "int8")
    assert back[0, 1].isnan().all()
    assert back.isfinite().sum() == 25
