"""Blocks as small integers: by hand, and loops against PyTorch operations, of all lengths and kinds of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hvdlm.gradients.codecs.blockwise import Part
from hvdlm.gradients.codecs.integer import (
    add_blocks,
    add_blocks_with_torch,
    count_bytes,
    count_scales,
    round_blocks,
    round_blocks_with_torch,
)

BITS = pytest.mark.parametrize("bits", [4, 8])
ROUND = pytest.mark.parametrize("way", [round_blocks, round_blocks_with_torch])
ADD = pytest.mark.parametrize("way", [add_blocks, add_blocks_with_torch])


def make_part(block: int, *spans: tuple[int, int]) -> Part:
    return Part(block, torch.tensor(spans), torch.empty(0, dtype=torch.int64))


def room(part: Part, bits: int) -> tuple[Tensor, Tensor]:
    return torch.empty(count_scales(part)), torch.empty(count_bytes(part, bits), dtype=torch.uint8)


@ROUND
def test_bytes_by_hand(way: Callable[..., None]) -> None:
    part = make_part(4, (1, 7))
    gradients = torch.tensor([9.0, 127.0, -1.4, 0.6, 30.0, 0.0, 0.0, 9.0])
    residual = torch.tensor([9.0, 0.0, 0.0, 1.0, -3.5, 0.0, 0.0, 9.0])
    scales, integers = room(part, 8)
    way(part, 8, gradients, residual, scales, integers)
    assert scales.tolist() == [1.0, 0.0]
    assert integers.view(torch.int8).tolist() == [127, -1, 2, 26, 0, 0]  # 26.5 goes to the even neighbour
    assert torch.allclose(residual, torch.tensor([9.0, 0.0, -0.4, -0.4, 0.5, 0.0, 0.0, 9.0]))
    assert gradients.tolist() == [9.0, 0.0, 0.0, 1.0, -3.5, 0.0, 0.0, 9.0]


@ROUND
def test_nibbles_by_hand(way: Callable[..., None]) -> None:
    part = make_part(5, (0, 5))
    gradients, residual = torch.tensor([14.0, -14.0, 5.2, 0.0, -2.0]), torch.zeros(5)
    scales, integers = room(part, 4)
    way(part, 4, gradients, residual, scales, integers)
    assert scales.tolist() == [2.0]
    # 7, -7, 3 (2.6), 0, -1 as 15, 1, 11, 8, 7: the first three in the low half of a byte, then the others above them
    assert integers.tolist() == [15 + 16 * 8, 1 + 16 * 7, 11 + 16 * 8]
    assert torch.allclose(residual, torch.tensor([0.0, 0.0, -0.8, 0.0, 0.0]), atol=1e-6)


@ADD
def test_adding_by_hand(way: Callable[..., None]) -> None:
    part = make_part(5, (0, 5))
    target = torch.ones(6)
    for _ in range(2):
        way(
            part,
            4,
            torch.tensor([2.0]),
            torch.tensor([15 + 16 * 8, 1 + 16 * 7, 11 + 16 * 8], dtype=torch.uint8),
            target,
        )
    assert target.tolist() == [29.0, -27.0, 13.0, 1.0, -3.0, 1.0]


@ROUND
@BITS
def test_what_is_not_finite_or_next_to_nothing(way: Callable[..., None], bits: int) -> None:
    part = make_part(3, (0, 12))
    gradients = torch.tensor([1.0, math.nan, 2.0, -math.inf, 3e38, 1.0, 1e-40, -1e-31, 0.0, 1e38, -1e38, 1.0])
    intended = gradients.clone()
    residual = torch.zeros(12)
    scales, integers = room(part, bits)
    way(part, bits, gradients, residual, scales, integers)
    assert scales.isnan().tolist() == [True, True, False, False]
    assert torch.equal(residual[6:9], intended[6:9])  # old_residual whole
    delivered = torch.zeros(12)
    add_blocks(part, bits, scales, integers, delivered)
    assert delivered[:6].isnan().all()
    assert not delivered[6:9].any()
    assert torch.allclose(delivered[9:], torch.tensor([1e38, -1e38, 0.0]))


@BITS
@pytest.mark.parametrize("block", [1, 2, 7, 255, 256])
@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1000])
def test_loops_and_torch_operations_agree(bits: int, block: int, length: int) -> None:
    part = make_part(block, (3, 3 + length), (length + 10, 2 * length + 10))
    draw = torch.Generator().manual_seed(block * 1000 + length)
    new, old_residual = (torch.randn(2 * length + 12, generator=draw) * 10 for _ in range(2))
    results = []
    for rounds, adds in ((round_blocks, add_blocks), (round_blocks_with_torch, add_blocks_with_torch)):
        gradients, residual, delivered = new.clone(), old_residual.clone(), torch.zeros_like(new)
        scales, integers = room(part, bits)
        rounds(part, bits, gradients, residual, scales, integers)
        adds(part, bits, scales, integers, delivered)
        results.append((gradients, residual, scales, integers, delivered))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    gradients, residual, scales, _, delivered = results[0]
    inside = torch.zeros(len(new), dtype=torch.bool)
    for start, stop in part.spans.tolist():
        inside[start:stop] = True
    assert torch.allclose((residual + delivered)[inside], (new + old_residual)[inside], rtol=1e-6, atol=1e-6)
    assert torch.equal(gradients[inside], old_residual[inside])
    assert torch.equal(gradients[~inside], new[~inside]) and torch.equal(residual[~inside], old_residual[~inside])
    assert residual[inside].abs().max() <= 0.5001 * scales.max()
