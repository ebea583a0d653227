"""Rounding to 16 bits against PyTorch's casts: every fp16 and bf16 number, and float32 numbers of all kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hvdlm.gradients.codecs import cast
from hvdlm.gradients.codecs.cast import (
    SegmentedEncoding,
    add_residual,
    narrow,
    power_of_two,
    powers_of_two,
    widen,
)

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for what a NaN says beside."""
    bits = torch.int16 if a.element_size() == 2 else torch.int32
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def every(dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16)).view(dtype)


@HALVES
def test_every_number_is_widened(dtype: torch.dtype) -> None:
    wide = torch.empty(2**16)
    widen(every(dtype), 1.0, wide)
    assert equal(wide, every(dtype).float())
    widen(every(dtype), 0.25, wide)
    assert equal(wide, every(dtype).float() * 0.25)


@HALVES
def test_numbers_are_rounded_as_a_cast_does(dtype: torch.dtype) -> None:
    exact = every(dtype).float()
    above, below = (torch.nextafter(exact, torch.tensor(limit)) for limit in (np.inf, -np.inf))
    halfway = (exact.double() + torch.roll(exact, -1).double()).mul(0.5).float()  # between neighbours, mostly
    bits = np.random.default_rng(7).integers(0, 2**32, 10**6, dtype=np.uint32)
    values = torch.cat([exact, above, below, halfway, torch.from_numpy(bits.view(np.float32).copy())])
    rounded = torch.empty(len(values), dtype=dtype)
    narrow(values, 1.0, rounded, None)
    assert equal(rounded, values.to(dtype))


@HALVES
def test_what_rounding_takes_is_the_difference(dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 0, 1000)
    values[:3] = torch.tensor([np.nan, np.inf, -np.inf])
    numbers, residual = torch.empty(1000, dtype=dtype), torch.empty(1000)
    narrow(values, 1024.0, numbers, residual)
    assert not residual[:3].any()
    assert torch.equal(numbers[3:].float() / 1024 + residual[3:], values[3:])
    assert residual[3:].any()


def test_the_residual_is_added_and_the_largest_is_found() -> None:
    values = torch.tensor([1.0, -5.0, 3.0])
    assert add_residual(values, None) == 5.0
    assert add_residual(values, torch.tensor([0.5, 4.0, 3.0])) == 6.0
    assert values.tolist() == [1.5, -1.0, 6.0]
    values[1] = -np.inf
    assert add_residual(values, None) == np.inf
    values[0] = np.nan
    assert np.isnan(add_residual(values, None))


@pytest.mark.parametrize(
    ("largest", "expected"), [(1.0, 2.0**15), (1.5, 2.0**14), (3e-39, 2.0**120), (0.0, 1.0), (np.inf, 1.0)]
)
def test_the_scale(largest: float, expected: float) -> None:
    assert power_of_two(2.0**15, largest) == expected
    assert power_of_two(2.0**15, np.nan) == 1.0


def test_scales_of_many_segments_are_those_of_each() -> None:
    bits = np.random.default_rng(3).integers(0, 2**31, 20_000, dtype=np.uint32).view(np.float32)
    powers = (2.0 ** np.arange(-149, 128)).astype(np.float32)
    below = np.nextafter(powers, np.float32(0))
    largest = np.concatenate([bits, powers, below, np.array([0.0, np.inf, np.nan], np.float32)])
    scales = powers_of_two(2.0**15, torch.from_numpy(largest))
    assert scales.tolist() == [power_of_two(2.0**15, float(each)) for each in largest]


@HALVES
@pytest.mark.parametrize("length", [0, 1, 7, 64, 65, 192, 200])
def test_segments_by_loops_and_by_torch_are_equal(
    dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of 64: none, a part of one, some with and without a shorter one behind them."""
    generator = torch.Generator().manual_seed(length)
    drawn = torch.randn(length, generator=generator) * torch.logspace(-30, 30, length)
    if length > 64:
        drawn[3], drawn[64] = np.nan, np.inf
    outcomes = []
    for by_loops in (True, False):
        monkeypatch.setattr(cast, "uses_loops", lambda _, by_loops=by_loops: by_loops)
        encoding = SegmentedEncoding(dtype, segment=64)
        values, residual = drawn.clone(), torch.full((length,), 1e-3)
        message = torch.zeros(encoding.nbytes(length) + 8, dtype=torch.uint8)  # it may be longer
        encoding.encode(values, message, residual)
        decoded = torch.empty(length)
        encoding.decode(message, decoded)
        outcomes.append((message, residual, decoded))
    assert torch.equal(outcomes[0][0], outcomes[1][0]) or length > 64  # bits of NaN may differ
    for by_loops_, by_torch in zip(outcomes[0][1:], outcomes[1][1:], strict=True):
        assert equal(by_loops_, by_torch)
    assert not outcomes[0][0][encoding.nbytes(length) :].any()
    if length <= 64:
        assert torch.equal(outcomes[0][2] + outcomes[0][1], drawn + 1e-3)  # nothing is lost


@HALVES
def test_a_segment_of_small_numbers_beside_one_of_large_ones_keeps_its_precision(dtype: torch.dtype) -> None:
    """With one scale for both, fp16 would make zeros of the small ones: 1e-10 of the largest."""
    encoding = SegmentedEncoding(dtype, segment=64)
    values = torch.cat([torch.full((64,), 1e4), torch.linspace(1e-6, 2e-6, 64)])
    message, decoded = torch.zeros(encoding.nbytes(128), dtype=torch.uint8), torch.empty(128)
    encoding.encode(values.clone(), message, None)
    encoding.decode(message, decoded)
    assert (decoded / values - 1).abs().max() <= 2.0 ** -(11 if dtype == torch.float16 else 8)
