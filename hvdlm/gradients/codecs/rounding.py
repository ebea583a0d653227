"""Numbers of a block as small integers and the block's scale: rounded to them, and added back.

Two implementations, equal bit for bit: loops that Numba compiles for the CPU, and PyTorch operations for other devices.
A number and what it was rounded to are within a factor of two of one another, or the latter is zero: so float32 holds
their difference, and nothing is lost. Only at the very edge of that, as scales are rounded too, may a last bit go.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numba
import numpy as np
import torch
from torch import Tensor

from hvdlm.gradients.codecs.blocks import Part

_MAGNITUDE = 0x7FFFFFFF  # of a float32's bits: all but the sign
_TOO_LARGE = 0x7F000000  # bits of 2**127, beyond which rounding might overflow; infinity and NaN stand above

# A block of nothing larger is owed whole: the inverse of its scale might be no finite float32.
_TINY = np.float32(2.0**-100)

# Two of these share a byte, and are not negative there.
_NIBBLE = 4
_NIBBLE_ZERO = 8


def top_of(bits: int) -> int:
    """The largest of the integers that a block's largest magnitude becomes; its negative is the smallest."""
    return int(2 ** (bits - 1) - 1)


def count_scales(part: Part) -> int:
    """Blocks of a part."""
    return part.entries(1)


def count_bytes(part: Part, bits: int) -> int:
    """Bytes of the integers of a part."""
    return sum((stop - start) // length * _bytes_of(length, bits) for start, stop, length in part.stretches())


def round_blocks(part: Part, bits: int, gradients: Tensor, residual: Tensor, scales: Tensor, integers: Tensor) -> None:
    """Writes what stands for blocks of `gradients` + `residual` into `scales` (float32) and `integers` (uint8).

    The scale of a block that is not finite, or nearly, is NaN. `residual` gets what rounding took, `gradients` the old
    residual.
    """
    if gradients.is_cpu:
        arrays = gradients.numpy(), residual.numpy(), scales.numpy(), integers.numpy()
        _round_blocks(part.block, part.spans.numpy(), bits, np.float32(top_of(bits)), *arrays)
    else:
        round_blocks_with_torch(part, bits, gradients, residual, scales, integers)


def add_blocks(part: Part, bits: int, scales: Tensor, integers: Tensor, target: Tensor) -> None:
    """Adds what scales and integers stand for to `target`, where the blocks lie."""
    if target.is_cpu:
        _add_blocks(part.block, part.spans.numpy(), bits, scales.numpy(), integers.numpy(), target.numpy())
    else:
        add_blocks_with_torch(part, bits, scales, integers, target)


def compile_for_cpu(bits: int) -> None:
    """Compiles both loops, or loads what an earlier process has compiled, so that no training step has to."""
    part = Part(2, torch.tensor([[0, 2]]), torch.empty(0, dtype=torch.int64))
    scales, integers = torch.zeros(1), torch.zeros(2, dtype=torch.uint8)
    round_blocks(part, bits, torch.zeros(2), torch.zeros(2), scales, integers)
    add_blocks(part, bits, scales, integers, torch.zeros(2))


@numba.njit(cache=True, nogil=True)  # nogil: the backward pass goes on meanwhile
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
            fresh = gradients[start : min(start + block, end)]
            owed = residual[start : min(start + block, end)]
            largest = np.int32(0)
            for place in range(len(owed)):
                intended = np.float32(fresh[place] + owed[place])
                fresh[place] = owed[place]
                owed[place] = intended
                # Over integers, whose greatest does not depend on the order of comparison: all lanes of a core work
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
                half = (len(owed) + 1) // 2
                out = integers[first : first + half]
                for place in range(half):
                    out[place] = _NIBBLE_ZERO * 17
                if inverse > 0:
                    _round_to_nibbles(owed, scale, inverse, out)
                first += half
            else:
                out = integers[first : first + len(owed)]
                for place in range(len(owed)):
                    out[place] = 0
                if inverse > 0:
                    _round_to_bytes(owed, scale, inverse, out)
                first += len(owed)


@numba.njit(cache=True, nogil=True)
def _round_to_bytes(owed: np.ndarray, scale: np.float32, inverse: np.float32, out: np.ndarray) -> None:
    for place in range(len(owed)):
        rounded = np.rint(np.float32(owed[place] * inverse))
        owed[place] = np.float32(owed[place] - np.float32(rounded * scale))
        out[place] = np.uint8(np.int32(rounded))


@numba.njit(cache=True, nogil=True)
def _round_to_nibbles(owed: np.ndarray, scale: np.float32, inverse: np.float32, out: np.ndarray) -> None:
    """The first half of a block in the low four bits, the second half in the high ones."""
    half = len(out)
    for place in range(half):
        rounded = np.rint(np.float32(owed[place] * inverse))
        owed[place] = np.float32(owed[place] - np.float32(rounded * scale))
        out[place] = np.uint8(np.int32(rounded) + np.int32(136))  # the high half stays 8, which is zero
    for place in range(half, len(owed)):
        rounded = np.rint(np.float32(owed[place] * inverse))
        owed[place] = np.float32(owed[place] - np.float32(rounded * scale))
        out[place - half] = np.uint8(np.int32(out[place - half]) + (np.int32(rounded) << np.int32(4)))


@numba.njit(cache=True, nogil=True)
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
                for place in range(half):
                    out[place] += np.float32(np.int32(codes[place] & 15) - _NIBBLE_ZERO) * scale
                for place in range(half, len(out)):
                    out[place] += np.float32(np.int32(codes[place - half] >> 4) - _NIBBLE_ZERO) * scale
                first += half
            else:
                codes = integers[first : first + len(out)]
                for place in range(len(out)):
                    out[place] += np.float32(np.int8(codes[place])) * scale
                first += len(out)


def round_blocks_with_torch(
    part: Part, bits: int, gradients: Tensor, residual: Tensor, scales: Tensor, integers: Tensor
) -> None:
    """`round_blocks` on any device."""
    for start, stop, length, blocks, codes in _tables(part, bits):
        fresh, owed = gradients[start:stop], residual[start:stop]
        intended = fresh + owed
        fresh.copy_(owed)
        rows = intended.view(-1, length)  # (blocks, length)
        largest = rows.abs().amax(1, keepdim=True)
        is_finite = largest < 2.0**127
        is_used = (largest >= float(_TINY)) & is_finite
        top = largest.new_tensor(top_of(bits))
        scale = torch.where(is_used, largest / top, 0.0)
        inverse = torch.where(is_used, top / largest, 0.0)
        rounded = torch.where(is_used, (rows * inverse).round(), 0.0)
        owed.copy_((rows - rounded * scale).view(-1))
        scales[blocks] = torch.where(is_finite, scale, math.nan).view(-1)
        integers[codes] = _packed(rounded.to(torch.int16), bits).reshape(-1)


def add_blocks_with_torch(part: Part, bits: int, scales: Tensor, integers: Tensor, target: Tensor) -> None:
    """`add_blocks` on any device."""
    for start, stop, length, blocks, codes in _tables(part, bits):
        rounded = _unpacked(integers[codes].view(-1, _bytes_of(length, bits)), bits)[:, :length]
        target[start:stop].view(-1, length).add_(rounded.float() * scales[blocks].view(-1, 1))


def _packed(rounded: Tensor, bits: int) -> Tensor:
    """(blocks, length) int16 as (blocks, bytes) uint8."""
    if bits != _NIBBLE:
        return rounded.to(torch.int8).view(torch.uint8)
    half = _bytes_of(rounded.shape[1], bits)
    low, high = rounded[:, :half], torch.nn.functional.pad(rounded[:, half:], (0, 2 * half - rounded.shape[1]))
    return (low + _NIBBLE_ZERO + 16 * (high + _NIBBLE_ZERO)).to(torch.uint8)


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    """(blocks, bytes) uint8 as (blocks, length or one more) int8."""
    if bits != _NIBBLE:
        return codes.view(torch.int8)
    return torch.cat([codes & 15, codes >> 4], dim=1).to(torch.int8) - _NIBBLE_ZERO


def _bytes_of(length: int, bits: int) -> int:
    return -(-length * bits // 8)


def _tables(part: Part, bits: int) -> Iterator[tuple[int, int, int, slice, slice]]:
    """Stretches of the buffer whose blocks have one length: start, stop, that length, their scales and integers."""
    number = first = 0
    for start, stop, length in part.stretches():
        count = (stop - start) // length
        nbytes = count * _bytes_of(length, bits)
        yield start, stop, length, slice(number, number + count), slice(first, first + nbytes)
        number, first = number + count, first + nbytes
