"""Codecs `int8` and `int4`: elements of matrices as small integers, with a scale for each 256 of them.

A quarter and an eighth of the bytes. The rounding error is added to the next step's gradients, so it is late by a step
or two, not by a hundred as where few elements are sent: AdamW's second moments change little, and training follows that
with dense gradients closely (benchmarks/LOG.md). Blocks and owners are those of ZeRO++'s quantised gradients (Wang et
al., ICLR 2024, section 3.3), which are sent by all-to-all so that a sum is rounded twice and not at every hop of a
ring; error feedback is our addition.

Rounding has two implementations, equal bit for bit: loops compiled by Numba for the CPU, and PyTorch operations for
other devices. A number and its rounded value are within a factor of two of each other, or the latter is zero: so
float32 holds their difference, and on one rank delivered + residual is the float32 sum gradient + old residual. Only as
scales are rounded too, a last bit may be lost at the edge of that range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.blockwise import LONGEST_BLOCK, BlockEncoding, BlockwiseCodec, Part
from hvdlm.gradients.codecs.codec import uses_loops
from hvdlm.gradients.codecs.compiled import compiled
from hvdlm.gradients.exchange import Exchange

_MAGNITUDE = 0x7FFFFFFF  # of a float32's bits: all but the sign
_TOO_LARGE = 0x7F000000  # bits of 2**127, beyond which rounding might overflow; infinity and NaN stand above

# A block without a larger magnitude stays in the residual: the inverse of its scale might not be finite in float32.
_TINY = np.float32(2.0**-100)

# Bits of an integer of which two share a byte, with an offset that makes them non-negative.
_NIBBLE = 4
_NIBBLE_OFFSET = 8


class Integer(BlockwiseCodec):
    """Sends large matrices as integers of a few bits, and biases and other small tensors as float32."""

    # Among two ranks all-gather and owners of parts send as much; among more all-gather sends more.
    most_ranks_of_all_gather = 2

    def __init__(self, bits: int, bucket: Bucket, settings: CompressionSection) -> None:
        """`bits`: 4 or 8."""
        super().__init__(bucket, settings, LONGEST_BLOCK)
        self._encoding = _IntegerEncoding(bits)
        if bucket.buffer.is_cpu:
            compile_for_cpu(bits)

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        self.reduce_by_(self._encoding, gradients, exchange)


class _IntegerEncoding(BlockEncoding):
    """A float32 scale for each block, then integers."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def nbytes(self, part: Part) -> int:
        return 4 * count_scales(part) + count_bytes(part, self._bits)

    def encode(self, part: Part, gradients: Tensor, residual: Tensor, message: Tensor) -> None:
        round_blocks(part, self._bits, gradients, residual, *self._sections(part, message))

    def is_finite(self, part: Part, message: Tensor) -> Tensor:
        scales, _ = self._sections(part, message)
        return scales.isfinite().all()

    def add(self, part: Part, message: Tensor, gradients: Tensor) -> None:
        add_blocks(part, self._bits, *self._sections(part, message), gradients)

    def _sections(self, part: Part, message: Tensor) -> tuple[Tensor, Tensor]:
        length = 4 * count_scales(part)
        return message[:length].view(torch.float32), message[length:]


def largest_integer(bits: int) -> int:
    """The integer to which the largest magnitude of a block is rounded; its negative is the smallest integer."""
    return int(2 ** (bits - 1) - 1)


def count_scales(part: Part) -> int:
    """Blocks of a part."""
    return part.chosen_count(1)


def count_bytes(part: Part, bits: int) -> int:
    """Bytes of the integers of a part."""
    return sum((stop - start) // length * _bytes_of(length, bits) for start, stop, length in part.runs())


def round_blocks(part: Part, bits: int, gradients: Tensor, residual: Tensor, scales: Tensor, integers: Tensor) -> None:
    """Rounds the blocks of `gradients` + `residual` to `scales` (float32) and `integers` (uint8).

    The scale of a block is NaN if a number in it is not finite, or 2**127 or more. `residual` is overwritten by the
    rounding error, `gradients` by the old residual.
    """
    if uses_loops(gradients):
        arrays = gradients.numpy(), residual.numpy(), scales.numpy(), integers.numpy()
        _round_blocks(part.block, part.spans.numpy(), bits, np.float32(largest_integer(bits)), *arrays)
    else:
        round_blocks_with_torch(part, bits, gradients, residual, scales, integers)


def add_blocks(part: Part, bits: int, scales: Tensor, integers: Tensor, target: Tensor) -> None:
    """Decodes scales and integers and adds them to the blocks of `target`."""
    if uses_loops(target):
        _add_blocks(part.block, part.spans.numpy(), bits, scales.numpy(), integers.numpy(), target.numpy())
    else:
        add_blocks_with_torch(part, bits, scales, integers, target)


def compile_for_cpu(bits: int) -> None:
    """Compiles the loops, or loads them from the cache, before the first training step."""
    part = Part(2, torch.tensor([[0, 2]]), torch.empty(0, dtype=torch.int64))
    scales, integers = torch.zeros(1), torch.zeros(2, dtype=torch.uint8)
    round_blocks(part, bits, torch.zeros(2), torch.zeros(2), scales, integers)
    add_blocks(part, bits, scales, integers, torch.zeros(2))


@compiled()
def _round_blocks(
    block: int,
    spans: np.ndarray,
    bits: int,
    top: np.float32,
    gradients: np.ndarray,
    residual: np.ndarray,
    scales: np.ndarray,
    integers: np.ndarray,
) -> None:
    number = first = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            gradient_block = gradients[start : min(start + block, end)]
            residual_block = residual[start : min(start + block, end)]
            largest = np.int32(0)
            for index in range(len(residual_block)):
                intended = np.float32(gradient_block[index] + residual_block[index])
                gradient_block[index] = residual_block[index]
                residual_block[index] = intended
                # Over integers, whose maximum does not depend on the order of comparison: the loop is vectorised
                largest = max(largest, np.int32(intended.view(np.int32) & _MAGNITUDE))
            magnitude = np.int32(largest).view(np.float32)
            scale = inverse = np.float32(0)
            if largest >= _TOO_LARGE:
                scale = np.float32(np.nan)
            elif magnitude >= _TINY:
                scale, inverse = np.float32(magnitude / top), np.float32(top / magnitude)
            scales[number] = scale
            number += 1
            if bits == _NIBBLE:
                half = (len(residual_block) + 1) // 2
                out = integers[first : first + half]
                for index in range(half):
                    out[index] = _NIBBLE_OFFSET * 17
                if inverse > 0:
                    _round_to_nibbles(residual_block, scale, inverse, out)
                first += half
            else:
                out = integers[first : first + len(residual_block)]
                for index in range(len(residual_block)):
                    out[index] = 0
                if inverse > 0:
                    _round_to_bytes(residual_block, scale, inverse, out)
                first += len(residual_block)


@compiled()
def _round_to_bytes(residual_block: np.ndarray, scale: np.float32, inverse: np.float32, out: np.ndarray) -> None:
    for index in range(len(residual_block)):
        rounded = np.rint(np.float32(residual_block[index] * inverse))
        residual_block[index] = np.float32(residual_block[index] - np.float32(rounded * scale))
        out[index] = np.uint8(np.int32(rounded))


@compiled()
def _round_to_nibbles(residual_block: np.ndarray, scale: np.float32, inverse: np.float32, out: np.ndarray) -> None:
    """The first half of a block in the low four bits, the second half in the high ones."""
    half = len(out)
    for index in range(half):
        rounded = np.rint(np.float32(residual_block[index] * inverse))
        residual_block[index] = np.float32(residual_block[index] - np.float32(rounded * scale))
        out[index] = np.uint8(np.int32(rounded) + np.int32(136))  # the high half stays 8, which stands for zero
    for index in range(half, len(residual_block)):
        rounded = np.rint(np.float32(residual_block[index] * inverse))
        residual_block[index] = np.float32(residual_block[index] - np.float32(rounded * scale))
        out[index - half] = np.uint8(np.int32(out[index - half]) + (np.int32(rounded) << np.int32(4)))


@compiled()
def _add_blocks(
    block: int, spans: np.ndarray, bits: int, scales: np.ndarray, integers: np.ndarray, target: np.ndarray
) -> None:
    number = first = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            out = target[start : min(start + block, end)]
            scale = scales[number]
            number += 1
            if bits == _NIBBLE:
                half = (len(out) + 1) // 2
                codes = integers[first : first + half]
                for index in range(half):
                    out[index] += np.float32(np.int32(codes[index] & 15) - _NIBBLE_OFFSET) * scale
                for index in range(half, len(out)):
                    out[index] += np.float32(np.int32(codes[index - half] >> 4) - _NIBBLE_OFFSET) * scale
                first += half
            else:
                codes = integers[first : first + len(out)]
                for index in range(len(out)):
                    out[index] += np.float32(np.int8(codes[index])) * scale
                first += len(out)


def round_blocks_with_torch(
    part: Part, bits: int, gradients: Tensor, residual: Tensor, scales: Tensor, integers: Tensor
) -> None:
    """`round_blocks` on any device."""
    for start, stop, length, blocks, codes in _runs(part, bits):
        gradient_block, residual_block = gradients[start:stop], residual[start:stop]
        intended = gradient_block + residual_block
        gradient_block.copy_(residual_block)
        rows = intended.view(-1, length)  # (blocks, length)
        largest = rows.abs().amax(1, keepdim=True)
        is_finite = largest < 2.0**127
        is_used = (largest >= float(_TINY)) & is_finite
        top = torch.full_like(largest, largest_integer(bits))  # a tensor from a number would be copied, and waited for
        scale = torch.where(is_used, largest / top, 0.0)
        inverse = torch.where(is_used, top / largest, 0.0)
        rounded = torch.where(is_used, (rows * inverse).round(), 0.0)
        residual_block.copy_((rows - rounded * scale).view(-1))
        scales[blocks] = torch.where(is_finite, scale, math.nan).view(-1)
        integers[codes] = _packed(rounded.to(torch.int16), bits).reshape(-1)


def add_blocks_with_torch(part: Part, bits: int, scales: Tensor, integers: Tensor, target: Tensor) -> None:
    """`add_blocks` on any device."""
    for start, stop, length, blocks, codes in _runs(part, bits):
        rounded = _unpacked(integers[codes].view(-1, _bytes_of(length, bits)), bits)[:, :length]
        target[start:stop].view(-1, length).add_(rounded.float() * scales[blocks].view(-1, 1))


def _packed(rounded: Tensor, bits: int) -> Tensor:
    """(blocks, length) int16 as (blocks, bytes) uint8."""
    if bits != _NIBBLE:
        return rounded.to(torch.int8).view(torch.uint8)
    half = _bytes_of(rounded.shape[1], bits)
    low, high = rounded[:, :half], torch.nn.functional.pad(rounded[:, half:], (0, 2 * half - rounded.shape[1]))
    return (low + _NIBBLE_OFFSET + 16 * (high + _NIBBLE_OFFSET)).to(torch.uint8)


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    """(blocks, bytes) uint8 as (blocks, length or one more) int8."""
    if bits != _NIBBLE:
        return codes.view(torch.int8)
    return torch.cat([codes & 15, codes >> 4], dim=1).to(torch.int8) - _NIBBLE_OFFSET


def _bytes_of(length: int, bits: int) -> int:
    return -(-length * bits // 8)


def _runs(part: Part, bits: int) -> Iterator[tuple[int, int, int, slice, slice]]:
    """For each run of blocks of one length: start, stop, that length, and its slices of scales and of integers."""
    number = first = 0
    for start, stop, length in part.runs():
        count = (stop - start) // length
        nbytes = count * _bytes_of(length, bits)
        yield start, stop, length, slice(number, number + count), slice(first, first + nbytes)
        number, first = number + count, first + nbytes
