"""Blocks as small integers: by hand, and loops against PyTorch operations, of all lengths and kinds of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hvdlm.gradients.codecs.blockwise import Part
from hvdlm.gradients.codecs.integer import (
    NumbersEncoding,
    add_blocks,
    add_blocks_with_torch,
    add_to_weights,
    count_bytes,
    count_scales,
    round_blocks,
    round_blocks_with_torch,
    round_differences,
    scale_dtype,
)

BITS = pytest.mark.parametrize("bits", [2, 4, 8])
ROUND = pytest.mark.parametrize("way", [round_blocks, round_blocks_with_torch])
ADD = pytest.mark.parametrize("way", [add_blocks, add_blocks_with_torch])


def make_part(block: int, *spans: tuple[int, int]) -> Part:
    return Part(block, torch.tensor(spans), torch.empty(0, dtype=torch.int64))


def room(part: Part, bits: int) -> tuple[Tensor, Tensor]:
    scales = torch.empty(4 * count_scales(part), dtype=torch.uint8).view(scale_dtype(bits))
    return scales, torch.empty(count_bytes(part, bits), dtype=torch.uint8)


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
    message = torch.tensor([2.0]), torch.tensor([15 + 16 * 8, 1 + 16 * 7, 11 + 16 * 8], dtype=torch.uint8)
    way(part, 4, [message, message], target, from_zero=False)
    assert target.tolist() == [29.0, -27.0, 13.0, 1.0, -3.0, 1.0]
    way(part, 4, [message, message], target, from_zero=True)
    assert target.tolist() == [28.0, -28.0, 12.0, 0.0, -4.0, 1.0]


@ROUND
def test_two_bits_by_hand(way: Callable[..., None]) -> None:
    """Mean magnitude 4.625, threshold 4.625 + (16 - 4.625) / 8, levels (1 + 2 + 1 + 0 + 2 + 3) / 6, (16 + 12) / 2."""
    part = make_part(8, (1, 9), (9, 14))
    intended = torch.tensor([9.0, 16.0, -1.0, 2.0, -12.0, 1.0, 0.0, -2.0, 3.0, 5.0, -5.0, -5.0, 5.0, 5.0, 9.0])
    gradients, residual = torch.full((15,), 0.5), intended - 0.5
    old_residual = residual.clone()
    levels, codes = room(part, 2)
    way(part, 2, gradients, residual, levels, codes)
    assert levels.tolist() == [1.5, 14.0, 0.0, 5.0]
    # Quarters of two numbers: 16 and -1, 2 and -12, 1 and 0, -2 and 3; of the second block one is full, none is left
    assert codes.tolist() == [1 + 4 * 0 + 16 * 0 + 64 * 2, 2 + 4 * 3, 1 + 4 * 3 + 16 * 1, 3 + 4 * 1]
    assert residual[1:9].tolist() == [2.0, 0.5, 0.5, 2.0, -0.5, -1.5, -0.5, 1.5]
    assert residual[9:].tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 8.5]
    assert torch.equal(gradients[1:14], old_residual[1:14])


@ADD
def test_adding_two_bits_by_hand(way: Callable[..., None]) -> None:
    part = make_part(8, (0, 8), (8, 13))
    target = torch.ones(14)
    levels = torch.tensor([1.5, 14.0, 0.0, 5.0], dtype=torch.bfloat16)
    way(part, 2, [(levels, torch.tensor([129, 14, 29, 7], dtype=torch.uint8))], target, from_zero=False)
    assert target.tolist() == [15.0, -0.5, 2.5, -13.0, 2.5, 2.5, -0.5, 2.5, 6.0, -4.0, -4.0, 6.0, 6.0, 1.0]


def test_two_bits_are_nearly_the_best_for_any_distribution() -> None:
    """Lloyd's and Max's levels leave 0.1175 of the square of Gaussian numbers, and 0.1762 of that of Laplacian ones."""
    draw = torch.Generator().manual_seed(0)
    gaussian = torch.randn(2**16, generator=draw)
    laplacian = gaussian.sign() * torch.empty(2**16).exponential_(generator=draw)
    for numbers, best in ((gaussian, 0.1175**0.5), (laplacian, 0.1762**0.5)):
        part = make_part(256, (0, 2**16))
        residual = torch.zeros(2**16)
        round_blocks(part, 2, numbers.clone(), residual, *room(part, 2))
        assert 0.97 * best < residual.norm() / numbers.norm() < 1.05 * best


@BITS
def test_numbers_of_any_length(bits: int) -> None:
    encoding = NumbersEncoding(bits)
    for length in (1, 255, 256, 1001):
        numbers = torch.linspace(-3, 4, length)
        message = torch.empty(encoding.nbytes(length), dtype=torch.uint8)
        integers = length // 256 * 32 * bits + math.ceil(length % 256 * bits / 8)
        assert len(message) == 4 * math.ceil(length / 256) + integers
        values = numbers.clone()
        encoding.encode(values, message)
        assert torch.equal(values, numbers)
        encoding.decode(message, values)
        assert (values - numbers).norm() <= {2: 0.3, 4: 0.1, 8: 0.01}[bits] * numbers.norm()


@ROUND
@BITS
def test_what_is_not_finite_or_next_to_nothing(way: Callable[..., None], bits: int) -> None:
    part = make_part(3, (0, 12))
    gradients = torch.tensor([1.0, math.nan, 2.0, -math.inf, 3e38, 1.0, 1e-40, -1e-31, 0.0, 1e38, -1e38, 1.0])
    intended = gradients.clone()
    residual = torch.zeros(12)
    scales, integers = room(part, bits)
    way(part, bits, gradients, residual, scales, integers)
    assert scales.view(4, -1).isnan().all(1).tolist() == [True, True, False, False]
    assert scales.view(4, -1).isfinite().all(1).tolist() == [False, False, True, True]
    assert torch.equal(residual[6:9], intended[6:9])  # old_residual whole
    delivered = torch.zeros(12)
    add_blocks(part, bits, [(scales, integers)], delivered, from_zero=False)
    assert delivered[:6].isnan().all()
    assert not delivered[6:9].any()
    assert torch.allclose(delivered[9:], torch.tensor([1e38, -1e38, 0.0]), rtol=2**-8 if bits == 2 else 1e-6)


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
        adds(part, bits, [(scales, integers)], delivered, from_zero=False)
        twice = new.clone()
        adds(part, bits, [(scales, integers)] * 2, twice, from_zero=True)
        results.append((gradients, residual, scales, integers, delivered, twice))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    gradients, residual, scales, _, delivered, twice = results[0]
    inside = torch.zeros(len(new), dtype=torch.bool)
    for start, stop in part.spans.tolist():
        inside[start:stop] = True
    assert torch.allclose((residual + delivered)[inside], (new + old_residual)[inside], rtol=1e-6, atol=1e-6)
    assert torch.equal(twice, torch.where(inside, 2 * delivered, new))
    assert torch.equal(gradients[inside], old_residual[inside])
    assert torch.equal(gradients[~inside], new[~inside]) and torch.equal(residual[~inside], old_residual[~inside])
    if bits == 2:
        assert residual[inside].norm() <= 0.45 * (new + old_residual)[inside].norm()
    else:
        assert residual[inside].abs().max() <= 0.5001 * scales.max()


@BITS
@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000])
def test_differences_are_rounded_as_by_two_steps(bits: int, length: int) -> None:
    """In one loop: bfloat16 weights from float32 numbers, by the message of their difference, rounded once more."""
    part = make_part(256, (3, 3 + length))
    numbers = torch.randn(length + 5, generator=torch.Generator().manual_seed(length))
    weights = (numbers + 0.01 * numbers.flip(0)).bfloat16()
    weights[3] = 0
    scales, integers = room(part, bits)
    error = torch.zeros_like(numbers)
    round_blocks_with_torch(part, bits, numbers - weights.float(), error, scales, integers)
    message = torch.zeros(scales.nbytes + len(integers) + 3, dtype=torch.uint8)
    round_differences(part, bits, numbers, weights, message)
    assert message[: scales.nbytes].view(scales.dtype).equal(scales)
    assert message[scales.nbytes : -3].equal(integers)

    expected = weights.float()
    add_blocks_with_torch(part, bits, [(scales, integers)], expected, from_zero=False)
    add_to_weights(part, bits, message, weights)
    assert weights.equal(expected.bfloat16())


@BITS
def test_differences_that_are_not_finite(bits: int) -> None:
    """All ranks then have NaN for the block, and no other."""
    part = make_part(256, (0, 512))
    numbers, weights = torch.ones(512), torch.ones(512).bfloat16()
    numbers[300] = math.inf
    message = torch.zeros(8 + 64 * bits, dtype=torch.uint8)
    round_differences(part, bits, numbers, weights, message)
    add_to_weights(part, bits, message, weights)
    assert weights[:256].eq(1).all() and weights[256:].isnan().all()
