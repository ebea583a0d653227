"""Codecs `int8`, `int4` and `int2`: elements of matrices as numbers of a few bits, with scales for each 256 of them.

A quarter, an eighth and a fifteenth of the bytes. The rounding error is added to the next step's gradients, so it is
late by a few steps, not by a hundred as where few elements are sent: AdamW's second moments change little, and with
`int8` and `int4` training follows that with dense gradients closely (benchmarks/LOG.md). Blocks and owners are those of
ZeRO++'s quantised gradients (Wang et al., ICLR 2024, section 3.3), which are sent by all-to-all so that a sum is
rounded twice and not at every hop of a ring; error feedback is our addition.

`int8` and `int4` send integers and, for each block, the scale that takes its largest magnitude to 127 or 7. Of the
integers -1, 0 and 1 such a scale would leave most numbers at zero. `int2` sends of each number the sign and whether it
is a large one, and of each block two levels, as bfloat16: the mean magnitude of its small numbers and that of its
large ones, a step of Lloyd's algorithm. Large is what lies above the mean magnitude by at least an eighth of the way to
the largest one.

Rounding has two implementations, equal bit for bit: loops compiled by Numba for the CPU (integer_loops.py,
level_loops.py), and PyTorch operations for other devices. With `int8` and `int4` a number and its rounded value are
within a factor of two of each other, or the latter is zero: so float32 holds their difference, and on one rank
delivered + residual is the float32 sum gradient + old residual. Only as scales are rounded too, a last bit may be lost
at the edge of that range. With `int2` a number may be less than half of its level: then their difference is rounded as
any float32 addition is, by at most 2**-24 of the level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hvdlm.arrays import as_array
from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs import integer_loops, level_loops
from hvdlm.gradients.codecs.block_loops import TINY
from hvdlm.gradients.codecs.blockwise import LONGEST_BLOCK, BlockEncoding, BlockwiseCodec, Part
from hvdlm.gradients.codecs.codec import uses_loops
from hvdlm.gradients.exchange import Exchange

# Bytes in front of the integers of a block: a float32 scale, or two levels as bfloat16
_SCALE_BYTES = 4


class Integer(BlockwiseCodec):
    """Sends large matrices as numbers of a few bits, and biases and other small tensors as float32."""

    # Among two ranks all-gather and owners of parts send as much; among more all-gather sends more.
    most_ranks_of_all_gather = 2

    def __init__(self, bits: int, bucket: Bucket, settings: CompressionSection) -> None:
        """`bits`: 2, 4 or 8."""
        super().__init__(bucket, settings, LONGEST_BLOCK)
        self._encoding = IntegerEncoding(bits)
        if bucket.buffer.is_cpu:
            compile_for_cpu(bits)

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        self.reduce_by_(self._encoding, gradients, exchange)

    def reduce_to_owners_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        self.reduce_to_owners_by_(self._encoding, gradients, exchange)

    def messages_to_owners(self, gradients: Tensor, owners: int, step: int) -> list[Tensor]:
        return self.messages_to_owners_by(self._encoding, gradients, owners)

    def add_message_(self, message: Tensor, own: Tensor, owner: int, owners: int, step: int) -> None:
        self.add_message_by_(self._encoding, message, own, owner, owners)


class IntegerEncoding(BlockEncoding):
    """The scales of all blocks, then their integers."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def nbytes(self, part: Part) -> int:
        return _SCALE_BYTES * count_scales(part) + count_bytes(part, self._bits)

    def encode(self, part: Part, gradients: Tensor, residual: Tensor, message: Tensor) -> None:
        round_blocks(part, self._bits, gradients, residual, *_sections(part, self._bits, message))

    def is_finite(self, part: Part, message: Tensor) -> Tensor:
        scales, _ = _sections(part, self._bits, message)
        return scales.isfinite().all()

    def add(self, part: Part, messages: Sequence[Tensor], gradients: Tensor, from_zero: bool) -> None:
        sections = [_sections(part, self._bits, message) for message in messages]
        add_blocks(part, self._bits, sections, gradients, from_zero)


class NumbersEncoding:
    """Any numbers, without error feedback, as `IntegerEncoding` encodes the blocks of a bucket."""

    def __init__(self, bits: int) -> None:
        self._encoding = IntegerEncoding(bits)

    def nbytes(self, elements: int) -> int:
        return self._encoding.nbytes(_all_of(elements))

    def encode(self, values: Tensor, message: Tensor) -> None:
        self._encoding.encode(_all_of(len(values)), values.clone(), torch.zeros_like(values), message)

    def decode(self, message: Tensor, values: Tensor) -> None:
        self._encoding.add(_all_of(len(values)), [message], values, from_zero=True)


def _all_of(elements: int) -> Part:
    return Part(LONGEST_BLOCK, torch.tensor([[0, elements]]), torch.empty(0, dtype=torch.int64))


def scale_dtype(bits: int) -> torch.dtype:
    """Of the scale of a block of 8 or 4 bits, or of the two levels of one of 2 bits, the smaller one first."""
    return torch.bfloat16 if bits == 2 else torch.float32


def _sections(part: Part, bits: int, message: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of all blocks, and their integers."""
    length = _SCALE_BYTES * count_scales(part)
    return message[:length].view(scale_dtype(bits)), message[length : length + count_bytes(part, bits)]


def count_scales(part: Part) -> int:
    """Blocks of a part."""
    return part.chosen_count(1)


def count_bytes(part: Part, bits: int) -> int:
    """Bytes of the integers of a part."""
    return sum((stop - start) // length * _bytes_of(length, bits) for start, stop, length in part.runs())


def round_blocks(part: Part, bits: int, gradients: Tensor, residual: Tensor, scales: Tensor, integers: Tensor) -> None:
    """Rounds the blocks of `gradients` + `residual` to `scales` (of `scale_dtype`) and `integers` (uint8).

    The scale or the levels of a block are NaN if a number in it is not finite, or 2**127 or more. `residual` is
    overwritten by the rounding error, `gradients` by the old residual.
    """
    if not uses_loops(gradients):
        round_blocks_with_torch(part, bits, gradients, residual, scales, integers)
        return
    blocks = part.block, as_array(part.spans)
    arrays = as_array(gradients), as_array(residual)
    if bits == 2:
        level_loops.round_to_levels(*blocks, *arrays, as_array(scales.view(torch.int16)), as_array(integers))
    else:
        integer_loops.round_to_integers(*blocks, bits, *arrays, as_array(scales), as_array(integers))


def add_blocks(
    part: Part, bits: int, messages: Sequence[tuple[Tensor, Tensor]], target: Tensor, from_zero: bool
) -> None:
    """Decodes the scales and integers of each message and adds them to the blocks of `target`, or to zeros there."""
    if not uses_loops(target):
        add_blocks_with_torch(part, bits, messages, target, from_zero)
        return
    blocks = part.block, as_array(part.spans)
    integers = tuple(as_array(each) for _, each in messages)
    if bits == 2:
        levels = tuple(as_array(scales.view(torch.int16)) for scales, _ in messages)
        level_loops.add_levels(*blocks, from_zero, levels, integers, as_array(target))
    else:
        integer_loops.add_integers(
            *blocks, bits, from_zero, tuple(as_array(each) for each, _ in messages), integers, as_array(target)
        )


def round_differences(part: Part, bits: int, numbers: Tensor, weights: Tensor, message: Tensor) -> None:
    """Encodes the blocks of `numbers` (float32) - `weights` (bfloat16), on a CPU, into `message`."""
    scales, integers = _sections(part, bits, message)
    blocks, arrays = (part.block, as_array(part.spans)), (as_array(numbers), _bits_of(weights))
    if bits == 2:
        level_loops.round_level_differences(*blocks, *arrays, as_array(scales.view(torch.int16)), as_array(integers))
    else:
        integer_loops.round_differences(*blocks, bits, *arrays, as_array(scales), as_array(integers))


def add_to_weights(part: Part, bits: int, message: Tensor, weights: Tensor) -> None:
    """Adds the decoded blocks of a message of `round_differences` to `weights`."""
    scales, integers = _sections(part, bits, message)
    blocks, arrays = (part.block, as_array(part.spans)), (as_array(integers), _bits_of(weights))
    if bits == 2:
        level_loops.add_levels_to_weights(*blocks, as_array(scales.view(torch.int16)), *arrays)
    else:
        integer_loops.add_to_weights(*blocks, bits, as_array(scales), *arrays)


def _bits_of(numbers: Tensor) -> np.ndarray:
    """16-bit numbers as unsigned integers, over the same memory."""
    return as_array(numbers.view(torch.int16)).view(np.uint16)


def compile_for_cpu(bits: int) -> None:
    """Compiles the loops, or loads them from the cache, before the first training step."""
    part = Part(2, torch.tensor([[0, 2]]), torch.empty(0, dtype=torch.int64))
    scales = torch.zeros(_SCALE_BYTES, dtype=torch.uint8).view(scale_dtype(bits))
    integers = torch.zeros(2, dtype=torch.uint8)
    round_blocks(part, bits, torch.zeros(2), torch.zeros(2), scales, integers)
    for count in range(1, Integer.most_ranks_of_all_gather + 1):
        add_blocks(part, bits, [(scales, integers)] * count, torch.zeros(2), from_zero=True)


def round_blocks_with_torch(
    part: Part, bits: int, gradients: Tensor, residual: Tensor, scales: Tensor, integers: Tensor
) -> None:
    """`round_blocks` on any device."""
    scales = scales.view(count_scales(part), -1)
    for start, stop, length, blocks, codes in _runs(part, bits):
        gradient_block, residual_block = gradients[start:stop], residual[start:stop]
        intended = gradient_block + residual_block
        gradient_block.copy_(residual_block)
        rows = intended.view(-1, length)  # (blocks, length)
        largest = rows.abs().amax(1, keepdim=True)
        is_finite = largest < 2.0**127
        is_used = (largest >= float(TINY)) & is_finite
        round_rows = _round_to_levels if bits == 2 else _round_to_integers
        rounded, own_scales, own_codes = round_rows(rows, largest, is_used, bits)
        residual_block.copy_((rows - rounded).view(-1))
        scales[blocks] = torch.where(is_finite, own_scales, math.nan).to(scales.dtype)
        integers[codes] = _packed(own_codes, bits).view(-1)


def _round_to_integers(rows: Tensor, largest: Tensor, is_used: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `rows` are rounded to, the scale of each (blocks, 1), and integers without a sign, uint8."""
    top = torch.full_like(largest, 2 ** (bits - 1) - 1)  # a tensor from a number would be copied, and waited for
    scale = torch.where(is_used, largest / top, 0.0)
    inverse = torch.where(is_used, top / largest, 0.0)
    rounding = float(integer_loops.ROUNDING)
    rounded = torch.where(is_used, (rows * inverse + rounding) - rounding, 0.0)
    offset = 8 if bits == 4 else 0
    return rounded * scale, scale, (rounded.to(torch.int8) + offset).view(torch.uint8)


def _round_to_levels(rows: Tensor, largest: Tensor, is_used: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `rows` are rounded to, the levels of each (blocks, 2), and codes: 1 for a large number, 2 for its sign."""
    units = torch.where(is_used, torch.full_like(largest, level_loops.UNITS) / largest, 0.0)
    in_units = torch.where(is_used, rows.abs() * units, 0.0).to(torch.int32)
    total = in_units.sum(1, keepdim=True)
    mean = total // rows.shape[1]
    is_large = in_units >= mean + ((level_loops.UNITS - mean) >> level_loops.THRESHOLD_SHIFT)
    count, large = is_large.sum(1, keepdim=True), (in_units * is_large).sum(1, keepdim=True)
    counts = torch.cat([rows.shape[1] - count, count], dim=1).clamp(min=1)
    means = torch.cat([total - large, large], dim=1).float() / counts.float()
    levels = torch.where(is_used, means * (largest / level_loops.UNITS), 0.0).bfloat16().float()
    level = torch.where(is_large, levels[:, 1:], levels[:, :1])
    # An unused block stays as it is, the signs of its zeros too
    rounded = torch.where(is_used, level.copysign(rows), 0.0)
    return rounded, levels, torch.where(is_used, is_large + 2 * rows.signbit(), 0).to(torch.uint8)


def add_blocks_with_torch(
    part: Part, bits: int, messages: Sequence[tuple[Tensor, Tensor]], target: Tensor, from_zero: bool
) -> None:
    """`add_blocks` on any device."""
    if from_zero:
        part.zero_blocks_(target)
    for scales, integers in messages:
        _add_message(part, bits, scales, integers, target)


def _add_message(part: Part, bits: int, scales: Tensor, integers: Tensor, target: Tensor) -> None:
    scales = scales.view(count_scales(part), -1).float()
    for start, stop, length, blocks, codes in _runs(part, bits):
        numbers = _unpacked(integers[codes].view(-1, _bytes_of(length, bits)), bits)[:, :length]
        own = scales[blocks]
        if bits == 2:
            level = torch.where((numbers & 1).bool(), own[:, 1:], own[:, :1])
            decoded = torch.where((numbers & 2).bool(), -level, level)
        else:
            offset = 8 if bits == 4 else 0
            decoded = (numbers.view(torch.int8) - offset).float() * own
        target[start:stop].view(-1, length).add_(decoded)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """(blocks, length) uint8 as (blocks, bytes) uint8: of several pieces of a block the first in the lowest bits."""
    count, nbytes = 8 // bits, _bytes_of(codes.shape[1], bits)
    zero = 8 if bits == 4 else 0
    pieces = torch.nn.functional.pad(codes, (0, count * nbytes - codes.shape[1]), value=zero).split(nbytes, dim=1)
    packed = torch.zeros_like(pieces[0])
    for index, piece in enumerate(pieces):
        packed |= piece << (bits * index)
    return packed


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """(blocks, bytes) uint8 as (blocks, length or a few more) uint8."""
    mask = 2**bits - 1
    return torch.cat([packed >> (bits * index) & mask for index in range(8 // bits)], dim=1)


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
