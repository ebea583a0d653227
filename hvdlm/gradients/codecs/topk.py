"""Codec `topk`: of each block of a matrix the numbers of largest magnitude travel, as fp16; the rest waits.

A block is at most 256 numbers, so that a place in it takes one byte, messages have one size on all ranks, and one pass
over memory suffices. What was not chosen, and what rounding to fp16 took from what was, is added to the next step's
gradients (blockwise.py; Lin et al., "Deep Gradient Compression", ICLR 2018, section 3). Owners choose in their turn.

On one rank delivered + residual is the float32 sum gradient + old residual, bit for bit: a number less its fp16
rounding is itself a float32 number, so no bit is lost, however small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs import halves, selection
from hvdlm.gradients.codecs.blocks import LONGEST_BLOCK, Part
from hvdlm.gradients.codecs.blockwise import BlockCoding, BlockwiseCodec
from hvdlm.gradients.codecs.cast import ScaledCast
from hvdlm.gradients.codecs.selection import add_chosen, choose
from hvdlm.gradients.exchange import Exchange
from hvdlm.gradients.feedback import reduce_whole_

_FP16 = ScaledCast(torch.float16)


class TopK(BlockwiseCodec):
    """Sends the share `compression.density` of each large matrix; biases and other small tensors as they are."""

    # For three ranks all-gather sends half as much again as the way by owners, but nobody waits for a second message.
    most_ranks_of_all_gather = 3

    def __init__(self, bucket: Bucket, settings: CompressionSection) -> None:
        self._kept = max(1, int(LONGEST_BLOCK * settings.density))
        super().__init__(bucket, settings, min(LONGEST_BLOCK, round(self._kept / settings.density)))
        if bucket.buffer.is_cpu:
            selection.compile_for_cpu()
            halves.compile_for_cpu()

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        kept = self._kept_at(step)
        if kept == self._block:
            reduce_whole_(gradients, self._residual, exchange)
        else:
            self.reduce_by_(_Largest(kept), gradients, exchange)

    def _kept_at(self, step: int) -> int:
        """Numbers of a block that travel: all for `compression.warmup_steps`, then exponentially fewer for as many."""
        warmup = self.settings.warmup_steps
        progress = min(max(step / warmup - 1, 0.0), 1.0) if warmup else 1.0
        return max(self._kept, round(self._block * math.pow(self.settings.density, progress)))


class _Largest(BlockCoding):
    """The numbers of largest magnitude of each block: values as fp16 with their scale, then places."""

    def __init__(self, kept: int) -> None:
        self._kept = kept

    def nbytes(self, part: Part) -> int:
        return sum(self._lengths(part))

    def encode(self, part: Part, gradients: Tensor, residual: Tensor, message: Tensor) -> None:
        numbers, places = self._sections(part, message)
        values, chosen = choose(part, self._kept, gradients, residual)
        places.copy_(chosen)
        if len(values):
            _FP16.encode(values, numbers)
            _FP16.decode(numbers, values)
        add_chosen(part, self._kept, values.neg_(), chosen, residual)

    def is_finite(self, part: Part, message: Tensor) -> bool:
        return bool(self._values(part, message).isfinite().all())

    def add(self, part: Part, message: Tensor, gradients: Tensor) -> None:
        _, places = self._sections(part, message)
        add_chosen(part, self._kept, self._values(part, message), places, gradients)

    def _values(self, part: Part, message: Tensor) -> Tensor:
        numbers, places = self._sections(part, message)
        values = torch.empty_like(places, dtype=torch.float32)
        if len(values):
            _FP16.decode(numbers, values)
        return values

    def _sections(self, part: Part, message: Tensor) -> tuple[Tensor, Tensor]:
        numbers, places = message[: self.nbytes(part)].split(self._lengths(part))
        return numbers, places

    def _lengths(self, part: Part) -> tuple[int, int]:
        entries = part.entries(self._kept)
        return _FP16.nbytes(entries), entries
