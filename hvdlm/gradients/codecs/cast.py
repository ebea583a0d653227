"""Codecs `fp16` and `bf16`: half as many bits for each number.

On our ring each segment has a scale of its own, so that no finite gradient overflows and the whole range of the type
lies below the largest magnitude of the segment; sums are float32. Where there is no ring the engine sums numbers of
that type, scaled so that no sum overflows.

Rounding has two implementations, equal bit for bit: loops compiled by Numba for the CPU, which add, round and subtract
in one pass over memory, and PyTorch operations for other devices. Numba has no 16-bit floats on CPUs, so the loops
compute their bits.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hvdlm.comm.communicator import ReduceOp
from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.codec import Codec, Residual
from hvdlm.gradients.codecs.compiled import compiled
from hvdlm.gradients.exchange import Exchange

_MAGNITUDE = 0x7FFFFFFF  # of a float32's bits: all but the sign
_INFINITE = 0x7F800000  # bits of infinity; NaN stands above
_NONE = np.empty(0, np.float32)

_SCALE_BYTES = 4

# The largest magnitude of a segment is scaled to at most this: below fp16's largest number, 65504, and as far as
# possible above its smallest normal one, 2**-14.
_TOP = 2.0**15


class CastEncoding:
    """A segment as a float32 scale, a power of two, then its numbers in a smaller type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def nbytes(self, elements: int) -> int:
        return _SCALE_BYTES + (elements * self._dtype.itemsize + 3) // 4 * 4  # messages begin at multiples of 4

    def encode(self, values: Tensor, message: Tensor, residual: Tensor | None = None) -> None:
        largest = add_residual(values, residual)
        scale = power_of_two(_TOP, largest)
        message[:_SCALE_BYTES].view(torch.float32).fill_(scale)
        narrow(values, scale, self._numbers(message, len(values)), residual)

    def decode(self, message: Tensor, values: Tensor) -> None:
        scale = float(message[:_SCALE_BYTES].view(torch.float32))
        factor = 1 / scale if scale else math.nan  # no encoder writes scale 0
        widen(self._numbers(message, len(values)), factor, values)

    def _numbers(self, message: Tensor, length: int) -> Tensor:
        return message[_SCALE_BYTES:].view(self._dtype)[:length]


class Cast(Codec):
    """Gradients as numbers of a 16-bit type; with error feedback the rounding error is added to the next step's."""

    def __init__(self, dtype: torch.dtype, bucket: Bucket, settings: CompressionSection) -> None:
        super().__init__(bucket, settings)
        self._dtype = dtype
        self._encoding = CastEncoding(dtype)
        self._residual = Residual(bucket, settings.error_feedback)
        if bucket.buffer.is_cpu:
            compile_for_cpu()

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        if exchange.has_ring:
            exchange.all_reduce_(gradients, self._encoding, self._residual.values)
            return
        self._residual.add_to_(gradients)
        largest = largest_of(gradients).reshape(1)
        exchange.all_reduce_(largest, op=ReduceOp.MAX)
        scale = power_of_two(_TOP / exchange.size, float(largest))
        numbers = (gradients * scale).to(self._dtype)
        self._residual.update(gradients, lambda: numbers.float() * (1 / scale))
        exchange.all_reduce_(numbers)
        gradients.copy_(numbers).mul_(1 / scale)

    def state(self) -> dict[str, Tensor]:
        return self._residual.state()


def add_residual(values: Tensor, residual: Tensor | None) -> float:
    """Adds `residual`, if any, to `values`, and returns the largest magnitude of the sums; NaN if one is NaN."""
    if values.is_cpu:
        return float(_add_residual(values.numpy(), _NONE if residual is None else residual.numpy()))
    if residual is not None:
        values.add_(residual)
    return float(largest_of(values))


def largest_of(values: Tensor) -> Tensor:
    """The largest magnitude; NaN if one is NaN. It takes a tenth of the time of torch.linalg.vector_norm."""
    return torch.stack(torch.aminmax(values)).abs().amax()


def narrow(values: Tensor, scale: float, numbers: Tensor, residual: Tensor | None) -> None:
    """Rounds `values` x `scale`, a power of two, to `numbers` (fp16 or bf16), and leaves the error in `residual`.

    The residual of a number that is not finite is zero.
    """
    if values.is_cpu:
        bits = numbers.view(torch.int16).numpy().view(np.uint16)
        errors = _NONE if residual is None else residual.numpy()
        factors = np.float32(scale), np.float32(1 / scale)
        _narrow(values.numpy(), *factors, numbers.dtype == torch.float16, bits, errors)
        return
    torch.mul(values, scale, out=numbers)
    if residual is not None:
        torch.sub(values, numbers.float().mul_(1 / scale), out=residual)
        residual.nan_to_num_(0.0, 0.0, 0.0)


def widen(numbers: Tensor, factor: float, values: Tensor) -> None:
    """Writes `numbers` (fp16 or bf16) x `factor`, a power of two, to `values`."""
    if values.is_cpu:
        bits = numbers.view(torch.int16).numpy().view(np.uint16)
        _widen(bits, np.float32(factor), numbers.dtype == torch.float16, values.numpy())
        return
    # Widened before it is multiplied: PyTorch would round, and overflow, in the smaller type
    values.copy_(numbers).mul_(factor)


def compile_for_cpu() -> None:
    """Compiles the loops, or loads them from the cache, before the first training step."""
    values, numbers = torch.zeros(1), torch.zeros(1, dtype=torch.float16)
    add_residual(values, None)
    narrow(values, 1.0, numbers, None)
    widen(numbers, 1.0, values)


@compiled()
def _add_residual(values: np.ndarray, residual: np.ndarray) -> np.float32:
    if len(residual):
        for index in range(len(values)):
            values[index] += residual[index]
    largest = np.int32(0)
    bits = values.view(np.int32)
    for index in range(len(bits)):
        # Over integers, whose maximum does not depend on the order of comparison: the loop is vectorised
        largest = max(largest, np.int32(bits[index] & _MAGNITUDE))
    return np.int32(largest).view(np.float32)


@compiled()
def _narrow(
    values: np.ndarray, scale: np.float32, factor: np.float32, is_fp16: bool, numbers: np.ndarray, errors: np.ndarray
) -> None:
    for index in range(len(values)):
        bits = np.float32(values[index] * scale).view(np.int32)
        numbers[index] = _fp16_bits(bits) if is_fp16 else _bf16_bits(bits)
    for index in range(len(errors)):
        number = np.int32(numbers[index])
        wide = _float_of_fp16(number) if is_fp16 else _float_of_bf16(number)
        error = np.float32(values[index] - np.float32(wide * factor))
        is_finite = (error.view(np.int32) & _MAGNITUDE) < _INFINITE
        errors[index] = error if is_finite else np.float32(0)


@compiled()
def _widen(numbers: np.ndarray, factor: np.float32, is_fp16: bool, values: np.ndarray) -> None:
    for index in range(len(values)):
        number = np.int32(numbers[index])
        wide = _float_of_fp16(number) if is_fp16 else _float_of_bf16(number)
        values[index] = np.float32(wide * factor)


@compiled()
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


@compiled()
def _float_of_fp16(number: np.int32) -> np.float32:
    magnitude = np.int32((number & np.int32(0x7FFF)) << np.int32(13))
    # As a float32 its exponent is 112 too small, also where it is subnormal
    scaled = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.int32)
    scaled = magnitude | np.int32(_INFINITE) if magnitude >= 0x0F800000 else scaled
    return np.int32(scaled | ((number & np.int32(0x8000)) << np.int32(16))).view(np.float32)


@compiled()
def _bf16_bits(bits: np.int32) -> np.uint16:
    """The nearest number that is the upper half of a float32, ties to even."""
    rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
    is_nan = (bits & _MAGNITUDE) > _INFINITE
    return np.uint16(np.int32(0x7FC0) if is_nan else rounded)


@compiled()
def _float_of_bf16(number: np.int32) -> np.float32:
    return np.int32(number << np.int32(16)).view(np.float32)


def power_of_two(top: float, largest: float) -> float:
    """The greatest power of two that takes `largest` to no more than `top`; 1 if there is nothing finite to scale."""
    if not 0 < largest < math.inf:
        return 1.0
    exponent = math.floor(math.log2(top) - math.log2(largest))
    return 2.0 ** max(-120, min(exponent, 120))  # it and its inverse are normal float32 numbers
