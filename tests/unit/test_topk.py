"""The largest of each block: by hand, and fuzzed against a sort, loops and PyTorch operations alike."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.blockwise import Part, split_into_parts
from hvdlm.gradients.codecs.topk import (
    add_chosen,
    add_chosen_with_torch,
    choose,
    choose_with_torch,
)

Chosen = tuple[Tensor, Tensor]


def with_torch(part: Part, kept: int, gradients: Tensor, residual: Tensor) -> Chosen:
    values = torch.empty(part.chosen_count(kept))
    indices = torch.empty(part.chosen_count(kept), dtype=torch.uint8)
    choose_with_torch(part, kept, gradients, residual, values, indices)
    return values, indices


BOTH = pytest.mark.parametrize("way", [choose, with_torch])


def one_span(length: int, block: int) -> Part:
    return Part(block, torch.tensor([[0, length]]), torch.empty(0, dtype=torch.int64))


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Also of NaN, and of zeros with a sign."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@BOTH
def test_by_hand(way: Callable[..., Chosen]) -> None:
    gradients = torch.tensor([1.0, -3.0, 2.0, 0.0, 5.0, -5.0, 5.0, 4.0, 7.0])
    residual = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -10.0, 1.0])
    values, indices = way(one_span(9, 4), 2, gradients, residual)
    # sums: [1.5, -3, 3, 0] [5, -5, 5, -6] [8]; among equal magnitudes the first; the last block has one number only
    assert values.tolist() == [-3.0, 3.0, -6.0, 5.0, 8.0]
    assert indices.tolist() == [1, 2, 3, 0, 0]
    assert residual.tolist() == [1.5, -3.0, 3.0, 0.0, 5.0, -5.0, 5.0, -6.0, 8.0]
    assert gradients.tolist() == [0.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -10.0, 1.0]


@pytest.mark.parametrize("way", [add_chosen, add_chosen_with_torch])
def test_adding_by_hand(way: Callable[..., None]) -> None:
    target = torch.zeros(9)
    chosen = torch.tensor([-3.0, 3.0, -6.0, 5.0, 8.0]), torch.tensor([1, 2, 3, 0, 0], dtype=torch.uint8)
    for _ in range(2):
        way(one_span(9, 4), 2, *chosen, target)
    assert target.tolist() == [0.0, -6.0, 6.0, 0.0, 10.0, 0.0, 0.0, -12.0, 16.0]


def drawn(generator: np.random.Generator, length: int) -> Tensor:
    """Numbers of all magnitudes that float32 has, with some of everything that is awkward."""
    values = generator.standard_normal(length) * 10.0 ** generator.integers(-46, 38, length)
    awkward = np.array([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 1.0, -1.0])
    return torch.from_numpy(np.where(generator.random(length) < 0.3, generator.choice(awkward, length), values)).float()


def expected_choice(intended: np.ndarray, kept: int) -> np.ndarray:
    """Places of the `kept` largest magnitudes, by a stable sort; NaN counts as more than infinity."""
    magnitudes = np.where(np.isnan(intended), np.inf, np.abs(intended))
    order = np.lexsort((np.arange(len(intended)), -magnitudes, ~np.isnan(intended)))
    return order[:kept]


@BOTH
@pytest.mark.parametrize("block", [1, 7, 200, 256])
@pytest.mark.parametrize("length", [1, 255, 256, 257, 65535, 65536, 65537])
def test_fuzzed_against_a_sort(way: Callable[..., Chosen], block: int, length: int) -> None:
    generator = np.random.default_rng(length * 1000 + block)
    part = one_span(length, block)
    for kept in {0, 1, 3, block}:
        gradients, residual = drawn(generator, length), drawn(generator, length)
        intended, owed = gradients + residual, residual.clone()
        values, indices = way(part, kept, gradients, residual)
        assert equal_bits(gradients, owed)
        assert torch.equal(residual.nan_to_num(9.0), intended.nan_to_num(9.0))
        starts = range(0, length, block)
        wanted = [expected_choice(intended[start : start + block].numpy(), kept) for start in starts]
        assert indices.tolist() == np.concatenate(wanted).tolist()
        where = np.concatenate([start + each for start, each in zip(starts, wanted, strict=True)])
        assert equal_bits(values, residual[torch.from_numpy(where)])
        target, expected = torch.zeros(length), torch.zeros(length)
        add_chosen(part, kept, values, indices, target)
        expected[torch.from_numpy(where)] = values
        assert torch.equal(target.nan_to_num(9.0), expected.nan_to_num(9.0))
        again = torch.zeros(length)
        add_chosen_with_torch(part, kept, values, indices, again)
        assert torch.equal(again.nan_to_num(9.0), target.nan_to_num(9.0))


def test_parts_hold_every_number_once() -> None:
    shapes = [(70, 100), (70,), (100, 41), (3, 3), (90, 50, 2), (1, 4096)]
    bucket = Bucket({str(index): nn.Parameter(torch.empty(shape)) for index, shape in enumerate(shapes)})
    for count in (1, 2, 5, 300):
        parts = split_into_parts(bucket, 64, count)
        assert len(parts) == count
        seen = torch.zeros_like(bucket.buffer)
        for part in parts:
            for start, stop in part.spans.tolist():
                seen[start:stop] += 1
            seen[part.dense] += 10
        # matrices of more than 4096 numbers in blocks, the rest as it is
        expected = [torch.full(shape, 1.0 if math.prod(shape) > 4096 else 10.0).flatten() for shape in shapes]
        assert torch.equal(seen, torch.cat(expected))
        # 110 + 65 + 141 blocks, the last of each shorter
        blocks = [sum(-(-(stop - start) // 64) for start, stop in part.spans.tolist()) for part in parts]
        assert sum(blocks) == 110 + 65 + 141
        assert max(blocks) == -(-sum(blocks) // count)
        dense = [len(part.dense) for part in parts]
        assert max(dense) - min(dense) <= 1
