"""float32 numbers rounded to fp16 or bf16 and back, and what rounding took.

Two implementations, equal bit for bit: loops that Numba compiles for the CPU, which add, round and subtract in one pass
over memory, and PyTorch operations for other devices. Numba has no 16-bit floats on CPUs, so these are made of bits.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF  # of a float32's bits: all but the sign
_INFINITE = 0x7F800000  # bits of infinity; NaN stands above
_NONE = np.empty(0, np.float32)


def add_errors(values: Tensor, errors: Tensor | None) -> float:
    """Adds `errors`, if there are any, to `values`, and returns the largest magnitude then; NaN if one is NaN."""
    if values.is_cpu:
        return float(_add_errors(values.numpy(), _NONE if errors is None else errors.numpy()))
    if errors is not None:
        values.add_(errors)
    return float(largest_of(values))


def largest_of(values: Tensor) -> Tensor:
    """The largest magnitude; NaN if one is. In a tenth of the time that torch.linalg.vector_norm takes for it."""
    return torch.stack(torch.aminmax(values)).abs().amax()


def narrow(values: Tensor, scale: float, numbers: Tensor, errors: Tensor | None) -> None:
    """Rounds `values` x `scale`, a power of two, to `numbers` (fp16 or bf16), and keeps what it took in `errors`.

    Of a number that is not finite nothing is kept.
    """
    if values.is_cpu:
        bits = numbers.view(torch.int16).numpy().view(np.uint16)
        kept = _NONE if errors is None else errors.numpy()
        factors = np.float32(scale), np.float32(1 / scale)
        _narrow(values.numpy(), *factors, numbers.dtype == torch.float16, bits, kept)
        return
    torch.mul(values, scale, out=numbers)
    if errors is not None:
        torch.sub(values, numbers.float().mul_(1 / scale), out=errors)
        errors.nan_to_num_(0.0, 0.0, 0.0)


def widen(numbers: Tensor, factor: float, values: Tensor) -> None:
    """Writes `numbers` (fp16 or bf16) x `factor`, a power of two, to `values`."""
    if values.is_cpu:
        bits = numbers.view(torch.int16).numpy().view(np.uint16)
        _widen(bits, np.float32(factor), numbers.dtype == torch.float16, values.numpy())
        return
    # float32 before it is multiplied: PyTorch would round, and overflow, as the smaller type does
    values.copy_(numbers).mul_(factor)


def compile_for_cpu() -> None:
    """Compiles the loops, or loads what an earlier process has compiled, so that no training step has to."""
    values, numbers = torch.zeros(1), torch.zeros(1, dtype=torch.float16)
    add_errors(values, None)
    narrow(values, 1.0, numbers, None)
    widen(numbers, 1.0, values)


@numba.njit(cache=True, nogil=True)  # nogil: the backward pass goes on meanwhile
def _add_errors(values: np.ndarray, errors: np.ndarray) -> np.float32:
    if len(errors):
        for place in range(len(values)):
            values[place] += errors[place]
    largest = np.int32(0)
    bits = values.view(np.int32)
    for place in range(len(bits)):
        # Over integers, whose greatest does not depend on the order of comparison: all lanes of a core work
        largest = max(largest, np.int32(bits[place] & _MAGNITUDE))
    return np.int32(largest).view(np.float32)


@numba.njit(cache=True, nogil=True)
def _narrow(
    values: np.ndarray, scale: np.float32, factor: np.float32, is_fp16: bool, numbers: np.ndarray, errors: np.ndarray
) -> None:
    for place in range(len(values)):
        bits = np.float32(values[place] * scale).view(np.int32)
        numbers[place] = _fp16_bits(bits) if is_fp16 else _bf16_bits(bits)
    for place in range(len(errors)):
        number = np.int32(numbers[place])
        wide = _float_of_fp16(number) if is_fp16 else _float_of_bf16(number)
        error = np.float32(values[place] - np.float32(wide * factor))
        is_finite = (error.view(np.int32) & _MAGNITUDE) < _INFINITE
        errors[place] = error if is_finite else np.float32(0)


@numba.njit(cache=True, nogil=True)
def _widen(numbers: np.ndarray, factor: np.float32, is_fp16: bool, values: np.ndarray) -> None:
    for place in range(len(values)):
        number = np.int32(numbers[place])
        wide = _float_of_fp16(number) if is_fp16 else _float_of_bf16(number)
        values[place] = np.float32(wide * factor)


@numba.njit(cache=True, nogil=True)
def _fp16_bits(bits: np.int32) -> np.uint16:
    """IEEE 754 binary16 nearest to a float32 of these bits, ties to even."""
    magnitude = np.int32(bits & _MAGNITUDE)
    # The exponent's bias is 112 less; half of the last bit that stays, less one if that bit is zero, carries into it
    normal = (magnitude - np.int32(0x38000000) + np.int32(0xFFF) + ((magnitude >> 13) & np.int32(1))) >> np.int32(13)
    # Below 2**-14 numbers are multiples of 2**-24, as float32 numbers are from 1/2 on: adding 1/2 rounds
    small = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.int32) - np.int32(0x3F000000)
    number = small if magnitude < 0x38800000 else normal
    number = np.int32(0x7C00) if magnitude >= 0x477FF000 else number  # nearer to infinity than to 65504
    number = np.int32(0x7E00) if magnitude > _INFINITE else number
    return np.uint16(number | ((bits >> np.int32(16)) & np.int32(0x8000)))


@numba.njit(cache=True, nogil=True)
def _float_of_fp16(number: np.int32) -> np.float32:
    magnitude = np.int32((number & np.int32(0x7FFF)) << np.int32(13))
    # As a float32 its exponent is 112 too small, also where it is subnormal
    scaled = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.int32)
    scaled = magnitude | np.int32(_INFINITE) if magnitude >= 0x0F800000 else scaled
    return np.int32(scaled | ((number & np.int32(0x8000)) << np.int32(16))).view(np.float32)


@numba.njit(cache=True, nogil=True)
def _bf16_bits(bits: np.int32) -> np.uint16:
    """The nearest number that is the upper half of a float32, ties to even."""
    rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
    is_nan = (bits & _MAGNITUDE) > _INFINITE
    return np.uint16(np.int32(0x7FC0) if is_nan else rounded)


@numba.njit(cache=True, nogil=True)
def _float_of_bf16(number: np.int32) -> np.float32:
    return np.int32(number << np.int32(16)).view(np.float32)


def power_of_two(top: float, largest: float) -> float:
    """The greatest power of two that takes `largest` to no more than `top`; 1 if there is nothing finite to scale."""
    if not 0 < largest < math.inf:
        return 1.0
    exponent = math.floor(math.log2(top) - math.log2(largest))
    return 2.0 ** max(-120, min(exponent, 120))  # it and its inverse are normal float32 numbers
