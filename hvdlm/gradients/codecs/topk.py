"""Codecs `topk` and `topk2`: of each block of a matrix the elements of largest magnitude travel, the rest is residual.

A block has at most 256 elements, so that an index in it takes one byte, messages have one size on all ranks, and one
pass over memory suffices. What was not chosen, and what rounding took from what was, is added to the next step's
gradients (blockwise.py; Lin et al., "Deep Gradient Compression", ICLR 2018, section 3). Owners of parts choose again.

`topk` sends them as fp16. On one rank delivered + residual is then the float32 sum gradient + old residual, bit for
bit: a number less its fp16 rounding is a float32 number, so no bit is lost, however small. `topk2` sends them as `int2`
does (integer.py), a sign and one of two magnitudes, as SparseLoCo sends what ranks have learned in local steps (Sarfi
et al., arXiv:2508.15706): with the index a number takes 10 bits, not 24, and more than twice as many are sent in as
many bytes.

Selection has two implementations, equal bit for bit: loops compiled by Numba for the CPU, each one pass over memory,
and PyTorch operations for other devices. Chosen elements are in the order of blocks, and within one the largest
magnitude first; among equal ones, the first in its block.
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
from hvdlm.gradients.codecs import cast, integer
from hvdlm.gradients.codecs.block_loops import MAGNITUDE
from hvdlm.gradients.codecs.blockwise import LONGEST_BLOCK, BlockEncoding, BlockwiseCodec, Part
from hvdlm.gradients.codecs.codec import add_dense_message_, reduce_dense_, uses_loops
from hvdlm.gradients.codecs.compiled import compiled
from hvdlm.gradients.exchange import Exchange

# How the chosen elements are sent, by their bits
_NUMBERS: dict[int, cast.CastEncoding | integer.NumbersEncoding] = {
    16: cast.CastEncoding(torch.float16),
    2: integer.NumbersEncoding(2),
}

# Without its sign bit a float32 is ordered by magnitude when read as an integer; NaN stands above infinity. The
# greatest key (magnitude x 256 + 255 - index) is that of the largest magnitude, at the smallest index among equals.
_LAST_INDEX = LONGEST_BLOCK - 1


class TopK(BlockwiseCodec):
    """Sends the share `compression.density` of each large matrix, and biases and other small tensors as float32."""

    # Among three ranks all-gather sends half as much again as owners of parts would, but needs one message, not two.
    most_ranks_of_all_gather = 3

    def __init__(self, bits: int, bucket: Bucket, settings: CompressionSection) -> None:
        """`bits`: of a number that is sent, 16 or 2."""
        self._bits = bits
        self._kept = max(1, int(LONGEST_BLOCK * settings.density))
        super().__init__(bucket, settings, min(LONGEST_BLOCK, round(self._kept / settings.density)))
        if bucket.buffer.is_cpu:
            compile_for_cpu()
            if bits == 2:
                integer.compile_for_cpu(bits)
            else:
                cast.compile_for_cpu()

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        kept = self._kept_at(step)
        if kept == self._block:
            reduce_dense_(gradients, self._residual, exchange)
        else:
            self.reduce_by_(_TopKEncoding(kept, self._bits), gradients, exchange)

    def messages_to_owners(self, gradients: Tensor, owners: int, step: int) -> list[Tensor]:
        kept = self._kept_at(step)
        if kept == self._block:
            return self.dense_messages_to_owners(gradients, owners)
        return self.messages_to_owners_by(_TopKEncoding(kept, self._bits), gradients, owners)

    def add_message_(self, message: Tensor, own: Tensor, owner: int, owners: int, step: int) -> None:
        kept = self._kept_at(step)
        if kept == self._block:
            add_dense_message_(message, own)
        else:
            self.add_message_by_(_TopKEncoding(kept, self._bits), message, own, owner, owners)

    def _kept_at(self, step: int) -> int:
        """Elements of a block to send: all for `compression.warmup_steps`, then exponentially fewer for as many."""
        warmup = self.settings.warmup_steps
        progress = min(max(step / warmup - 1, 0.0), 1.0) if warmup else 1.0
        return max(self._kept, round(self._block * math.pow(self.settings.density, progress)))


class _TopKEncoding(BlockEncoding):
    """The elements of largest magnitude of each block: values with their scales, then indices."""

    def __init__(self, kept: int, bits: int) -> None:
        self._kept = kept
        self._numbers = _NUMBERS[bits]

    def nbytes(self, part: Part) -> int:
        return sum(self._lengths(part))

    def encode(self, part: Part, gradients: Tensor, residual: Tensor, message: Tensor) -> None:
        numbers, indices = self._sections(part, message)
        values, chosen = choose(part, self._kept, gradients, residual)
        indices.copy_(chosen)
        if len(values):
            self._numbers.encode(values, numbers)
            self._numbers.decode(numbers, values)
        add_chosen(part, self._kept, values.neg_(), chosen, residual)

    def is_finite(self, part: Part, message: Tensor) -> Tensor:
        return self._values(part, message).isfinite().all()

    def add(self, part: Part, messages: Sequence[Tensor], gradients: Tensor, from_zero: bool) -> None:
        if from_zero:
            part.zero_blocks_(gradients)
        for message in messages:
            _, indices = self._sections(part, message)
            add_chosen(part, self._kept, self._values(part, message), indices, gradients)

    def _values(self, part: Part, message: Tensor) -> Tensor:
        numbers, indices = self._sections(part, message)
        values = torch.empty_like(indices, dtype=torch.float32)
        if len(values):
            self._numbers.decode(numbers, values)
        return values

    def _sections(self, part: Part, message: Tensor) -> tuple[Tensor, Tensor]:
        numbers, indices = message[: self.nbytes(part)].split(self._lengths(part))
        return numbers, indices

    def _lengths(self, part: Part) -> tuple[int, int]:
        count = part.chosen_count(self._kept)
        return self._numbers.nbytes(count), count


def choose(part: Part, kept: int, gradients: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the blocks of `gradients` to those of `residual`, and returns the `kept` largest magnitudes of each block.

    They are returned as float32 values, which `residual` still contains, and uint8 indices within their blocks.
    `gradients` is overwritten by the old residual, so that the step can be undone.
    """
    values = gradients.new_empty(part.chosen_count(kept))
    indices = torch.empty_like(values, dtype=torch.uint8)
    if uses_loops(gradients):
        arrays = as_array(gradients), as_array(residual), as_array(values), as_array(indices)
        _choose(part.block, as_array(part.spans), kept, *arrays)
    else:
        choose_with_torch(part, kept, gradients, residual, values, indices)
    return values, indices


def add_chosen(part: Part, kept: int, values: Tensor, indices: Tensor, target: Tensor) -> None:
    """Adds each of `values` to `target` where `choose` has found it."""
    if uses_loops(target):
        _add_chosen(part.block, as_array(part.spans), kept, as_array(values), as_array(indices), as_array(target))
    else:
        add_chosen_with_torch(part, kept, values, indices, target)


def compile_for_cpu() -> None:
    """Compiles the loops, or loads them from the cache, before the first training step."""
    part = Part(1, torch.tensor([[0, 1]]), torch.empty(0, dtype=torch.int64))
    values, indices = choose(part, 1, torch.zeros(1), torch.zeros(1))
    add_chosen(part, 1, values, indices, torch.zeros(1))


@compiled()
def _choose(
    block: int,
    spans: np.ndarray,
    kept: int,
    gradients: np.ndarray,
    residual: np.ndarray,
    values: np.ndarray,
    indices: np.ndarray,
) -> None:
    keys = np.empty(LONGEST_BLOCK, np.int64)
    entry = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            gradient_block = gradients[start : min(start + block, end)]
            residual_block = residual[start : min(start + block, end)]
            for index in range(len(residual_block)):
                intended = np.float32(gradient_block[index] + residual_block[index])
                gradient_block[index] = residual_block[index]
                residual_block[index] = intended
                magnitude = np.int64(intended.view(np.int32) & MAGNITUDE)
                keys[index] = magnitude * LONGEST_BLOCK + _LAST_INDEX - index
            for _ in range(min(kept, len(residual_block))):
                # Over integers, whose maximum does not depend on the order of comparison: the loop is vectorised
                greatest = np.int64(-1)
                for index in range(len(residual_block)):
                    greatest = max(greatest, keys[index])
                chosen = _LAST_INDEX - (greatest & _LAST_INDEX)
                keys[chosen] = -1
                values[entry] = residual_block[chosen]
                indices[entry] = chosen
                entry += 1


@compiled()
def _add_chosen(
    block: int, spans: np.ndarray, kept: int, values: np.ndarray, indices: np.ndarray, target: np.ndarray
) -> None:
    entry = 0
    for span in range(len(spans)):
        end = spans[span, 1]
        for start in range(spans[span, 0], end, block):
            for _ in range(min(kept, min(start + block, end) - start)):
                target[start + indices[entry]] += values[entry]
                entry += 1


def choose_with_torch(
    part: Part, kept: int, gradients: Tensor, residual: Tensor, values: Tensor, indices: Tensor
) -> None:
    """`choose` on any device, into `values` and `indices`."""
    for start, stop, length, entries in _runs(part, kept):
        gradient_block, residual_block = gradients[start:stop], residual[start:stop]
        intended = gradient_block + residual_block
        gradient_block.copy_(residual_block)
        residual_block.copy_(intended)
        rows = intended.view(-1, length)  # (blocks, length)
        descending = torch.arange(_LAST_INDEX, _LAST_INDEX - length, -1, device=rows.device)
        keys = (rows.view(torch.int32) & MAGNITUDE).long() * LONGEST_BLOCK + descending
        chosen = _LAST_INDEX - (keys.topk(min(kept, length), dim=1).values & _LAST_INDEX)
        values[entries] = rows.gather(1, chosen).view(-1)
        indices[entries] = chosen.view(-1).to(torch.uint8)


def add_chosen_with_torch(part: Part, kept: int, values: Tensor, indices: Tensor, target: Tensor) -> None:
    """`add_chosen` on any device."""
    for start, stop, length, entries in _runs(part, kept):
        rows = target[start:stop].view(-1, length)  # (blocks, length)
        shape = (len(rows), min(kept, length))
        rows.scatter_add_(1, indices[entries].view(shape).long(), values[entries].view(shape))


def _runs(part: Part, kept: int) -> Iterator[tuple[int, int, int, slice]]:
    """For each run of blocks of one length: start, stop, that length, and which of the chosen elements are its."""
    entry = 0
    for start, stop, length in part.runs():
        entries = (stop - start) // length * min(kept, length)
        yield start, stop, length, slice(entry, entry + entries)
        entry += entries
