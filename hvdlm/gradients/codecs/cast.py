"""Codecs `fp16` and `bf16`: half as many bits for each number.

Each segment has a scale of its own, so that no finite gradient overflows and the whole range of the type lies below the
largest magnitude of the segment; sums are float32. On our ring a segment is encoded anew at each hop. Where there is no
ring, each rank owns a part of the bucket: the others send it theirs of that part, it adds them in float32, encodes the
sum and sends that to all. Both send 2 n (P-1)/P bytes for n encoded ones on P ranks, whatever the engine can sum.

Rounding has two implementations, equal bit for bit: loops compiled by Numba for the CPU, which add, round and subtract
in one pass over memory, and PyTorch operations for other devices, all segments of one length at once and without a
number that the host would have to wait for. Numba has no 16-bit floats on CPUs, so the loops compute their bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hvdlm.arrays import as_array
from hvdlm.comm.communicator import part_lengths
from hvdlm.comm.ring import SEGMENT
from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.block_loops import MAGNITUDE, bf16_bits, float_of_bf16
from hvdlm.gradients.codecs.codec import Codec, Residual, uses_loops
from hvdlm.gradients.codecs.compiled import compiled
from hvdlm.gradients.exchange import Exchange

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
        return _SCALE_BYTES + _padded(elements * self._dtype.itemsize)

    def encode(self, values: Tensor, message: Tensor, residual: Tensor | None = None) -> None:
        _encode(values, *self._sections(message, len(values)), residual)

    def decode(self, message: Tensor, values: Tensor) -> None:
        _decode(*self._sections(message, len(values)), values)

    def _sections(self, message: Tensor, length: int) -> tuple[Tensor, Tensor]:
        scale, numbers = message[:_SCALE_BYTES], message[_SCALE_BYTES:]
        return scale.view(torch.float32), numbers.view(self._dtype)[:length]


class SegmentedEncoding:
    """Consecutive segments: the scales of all of them, then the numbers of all."""

    def __init__(self, dtype: torch.dtype, segment: int = SEGMENT) -> None:
        """`segment`: elements of a segment; the last one may have fewer."""
        self._dtype, self._segment = dtype, segment

    def nbytes(self, elements: int) -> int:
        return self._scale_bytes(elements) + _padded(elements * self._dtype.itemsize)

    def encode(self, values: Tensor, message: Tensor, residual: Tensor | None) -> None:
        """As `CastEncoding.encode`; `message` may be longer than `nbytes`."""
        for span, which, scales, numbers in self._runs(message, len(values)):
            _encode(values[span], scales[which], numbers[span], None if residual is None else residual[span])

    def decode(self, message: Tensor, values: Tensor) -> None:
        for span, which, scales, numbers in self._runs(message, len(values)):
            _decode(scales[which], numbers[span], values[span])

    def _scale_bytes(self, elements: int) -> int:
        return _SCALE_BYTES * -(-elements // self._segment)

    def _runs(self, message: Tensor, length: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Segments that are encoded in one call, and which scales are theirs; then all scales, and all numbers.

        On a CPU these are single segments, which its cache holds; elsewhere all of one length.
        """
        scales = message[: self._scale_bytes(length)].view(torch.float32)
        numbers = message[self._scale_bytes(length) :].view(self._dtype)[:length]
        whole = length // self._segment
        at_once = 1 if uses_loops(message) else max(1, whole)
        bounds = [*range(0, whole, at_once), *([whole] if length % self._segment else [])]
        for first in bounds:
            last = first + (at_once if first < whole else 1)
            span = slice(first * self._segment, min(last * self._segment, length))
            yield span, slice(first, last), scales, numbers


class Cast(Codec):
    """Gradients as numbers of a 16-bit type; with error feedback the rounding error is added to the next step's."""

    def __init__(self, dtype: torch.dtype, bucket: Bucket, settings: CompressionSection) -> None:
        super().__init__(bucket, settings)
        self._encoding, self._segments = CastEncoding(dtype), SegmentedEncoding(dtype)
        self._residual = Residual(bucket, settings.error_feedback)
        if bucket.buffer.is_cpu:
            compile_for_cpu()

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        if exchange.has_ring:
            exchange.all_reduce_(gradients, self._encoding, self._residual.values)
        else:
            self._reduce_by_owners(gradients, exchange)

    def _reduce_by_owners(self, gradients: Tensor, exchange: Exchange) -> None:
        """Each rank encodes each number once, the others' or its own sum, so its residual is added once."""
        parts = gradients.split(part_lengths(len(gradients), exchange.size))
        residuals, nbytes = self._sum_at_owner_(parts, exchange)
        own_sum = self._encoded(parts[exchange.rank], residuals[exchange.rank], nbytes)
        for part, message in zip(parts, exchange.all_gather(own_sum), strict=True):
            self._segments.decode(message, part)

    def reduce_to_owners_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        if self._residual.values is not None:
            residual = exchange.part_of(self._residual.values)  # of an earlier layout: what a rank owns leaves none
            exchange.part_of(gradients).add_(residual)
            residual.zero_()
        self._sum_at_owner_(gradients.split(len(gradients) // exchange.size), exchange)

    def messages_to_owners(self, gradients: Tensor, owners: int, step: int) -> list[Tensor]:
        length, residual = len(gradients) // owners, self._residual.values
        residuals = [None] * owners if residual is None else [*residual.split(length)]
        nbytes = self._segments.nbytes(length)
        pairs = zip(gradients.split(length), residuals, strict=True)
        return [self._encoded(part, error, nbytes) for part, error in pairs]

    def add_message_(self, message: Tensor, own: Tensor, owner: int, owners: int, step: int) -> None:
        decoded = torch.empty_like(own)
        self._segments.decode(message, decoded)
        own.add_(decoded)

    def _sum_at_owner_(self, parts: Sequence[Tensor], exchange: Exchange) -> tuple[list[Tensor | None], int]:
        """Adds to this rank's part what the others send of it; returns the residuals of all parts, and the bytes of a
        message.
        """
        lengths = [len(part) for part in parts]
        residual = self._residual.values
        residuals: list[Tensor | None] = [None] * exchange.size if residual is None else [*residual.split(lengths)]
        nbytes, rank = self._segments.nbytes(max(lengths)), exchange.rank
        messages = []
        for owner, (part, error) in enumerate(zip(parts, residuals, strict=True)):
            is_own = owner == rank  # which it adds unrounded
            messages.append(part.new_zeros(nbytes, dtype=torch.uint8) if is_own else self._encoded(part, error, nbytes))
        decoded = torch.empty_like(parts[rank])
        for source, message in enumerate(exchange.all_to_all(messages)):
            if source != rank:
                self._segments.decode(message, decoded)
                parts[rank].add_(decoded)
        return residuals, nbytes

    def _encoded(self, part: Tensor, residual: Tensor | None, nbytes: int) -> Tensor:
        message = part.new_zeros(nbytes, dtype=torch.uint8)
        self._segments.encode(part, message, residual)
        return message

    def state(self) -> dict[str, Tensor]:
        return self._residual.state()


def _padded(nbytes: int) -> int:
    """Messages begin at multiples of 4."""
    return (nbytes + 3) // 4 * 4


def _encode(values: Tensor, scales: Tensor, numbers: Tensor, residual: Tensor | None) -> None:
    """Encodes segments of equal length, as many as there are `scales`; where loops do it, one."""
    if uses_loops(values):
        scale = power_of_two(_TOP, add_residual(values, residual))
        scales.fill_(scale)
        narrow(values, scale, numbers, residual)
    else:
        encode_with_torch(values, scales, numbers, residual)


def _decode(scales: Tensor, numbers: Tensor, values: Tensor) -> None:
    if uses_loops(values):
        scale = float(scales)
        widen(numbers, 1 / scale if scale else math.nan, values)  # no encoder writes scale 0
    else:
        decode_with_torch(scales, numbers, values)


def add_residual(values: Tensor, residual: Tensor | None) -> float:
    """Adds `residual`, if any, to `values`, and returns the largest magnitude of the sums; NaN if one is NaN."""
    return float(_add_residual(as_array(values), _NONE if residual is None else as_array(residual)))


def narrow(values: Tensor, scale: float, numbers: Tensor, residual: Tensor | None) -> None:
    """Rounds `values` x `scale`, a power of two, to `numbers` (fp16 or bf16), and leaves the error in `residual`.

    The residual of a number that is not finite is zero.
    """
    bits = as_array(numbers.view(torch.int16)).view(np.uint16)
    errors = _NONE if residual is None else as_array(residual)
    factors = np.float32(scale), np.float32(1 / scale)
    _narrow(as_array(values), *factors, numbers.dtype == torch.float16, bits, errors)


def widen(numbers: Tensor, factor: float, values: Tensor) -> None:
    """Writes `numbers` (fp16 or bf16) x `factor`, a power of two, to `values`."""
    bits = as_array(numbers.view(torch.int16)).view(np.uint16)
    _widen(bits, np.float32(factor), numbers.dtype == torch.float16, as_array(values))


def encode_with_torch(values: Tensor, scales: Tensor, numbers: Tensor, residual: Tensor | None) -> None:
    """Encodes as many segments of equal length as there are `scales`, on any device."""
    if residual is not None:
        values.add_(residual)
    rows = values.view(len(scales), -1)  # (segments, length)
    least, greatest = torch.aminmax(rows, dim=1)
    scales.copy_(powers_of_two(_TOP, torch.maximum(greatest, -least)))
    factors = scales[:, None]
    torch.mul(rows, factors, out=numbers.view(rows.shape))  # in float32, then rounded
    if residual is not None:
        torch.sub(rows, numbers.view(rows.shape).float().div_(factors), out=residual.view(rows.shape))
        residual.nan_to_num_(0.0, 0.0, 0.0)


def decode_with_torch(scales: Tensor, numbers: Tensor, values: Tensor) -> None:
    """Decodes as many segments of equal length as there are `scales`, on any device; NaN by a scale of 0."""
    # Widened before they are multiplied: PyTorch would round, and overflow, in the smaller type
    factors = torch.where(scales != 0, scales.reciprocal(), math.nan)
    torch.mul(numbers.view(len(scales), -1).float(), factors[:, None], out=values.view(len(scales), -1))


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
        largest = max(largest, np.int32(bits[index] & MAGNITUDE))
    return np.int32(largest).view(np.float32)


@compiled()
def _narrow(
    values: np.ndarray, scale: np.float32, factor: np.float32, is_fp16: bool, numbers: np.ndarray, errors: np.ndarray
) -> None:
    for index in range(len(values)):
        bits = np.float32(values[index] * scale).view(np.int32)
        numbers[index] = _fp16_bits(bits) if is_fp16 else bf16_bits(bits)
    for index in range(len(errors)):
        number = np.int32(numbers[index])
        wide = _float_of_fp16(number) if is_fp16 else float_of_bf16(number)
        error = np.float32(values[index] - np.float32(wide * factor))
        is_finite = (error.view(np.int32) & MAGNITUDE) < _INFINITE
        errors[index] = error if is_finite else np.float32(0)


@compiled()
def _widen(numbers: np.ndarray, factor: np.float32, is_fp16: bool, values: np.ndarray) -> None:
    for index in range(len(values)):
        number = np.int32(numbers[index])
        wide = _float_of_fp16(number) if is_fp16 else float_of_bf16(number)
        values[index] = np.float32(wide * factor)


@compiled()
def _fp16_bits(bits: np.int32) -> np.uint16:
    """IEEE 754 binary16 nearest to a float32 of these bits, ties to even."""
    magnitude = np.int32(bits & MAGNITUDE)
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


def power_of_two(top: float, largest: float) -> float:
    """The greatest power of two that takes `largest` to no more than `top`; 1 if there is nothing finite to scale."""
    if not 0 < largest < math.inf:
        return 1.0
    exponent = math.floor(math.log2(top) - math.log2(largest))
    return 2.0 ** max(-120, min(exponent, 120))  # it and its inverse are normal float32 numbers


def powers_of_two(top: float, largest: Tensor) -> Tensor:
    """`power_of_two` of each number, on its device."""
    top_mantissa, top_exponent = math.frexp(top)
    mantissa, exponent = torch.frexp(largest)  # mantissa x 2**exponent, the mantissa from 1/2 to below 1
    exponent = (top_exponent - exponent - (mantissa > top_mantissa).int()).clamp(-120, 120)
    power = ((exponent + 127) << 23).view(torch.float32)  # its bits as a float32
    return torch.where((largest > 0) & largest.isfinite(), power, 1.0)
