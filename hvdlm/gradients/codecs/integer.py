"""Codecs `int8` and `int4`: numbers of matrices as small integers, and a scale for each 256 of them.

A quarter and an eighth of the bytes. What rounding took from a number goes with the next step's, so that it is late by
a step or two, not by a hundred as where few numbers travel: AdamW's second moments stay what they are, and training
follows that with whole gradients closely (benchmarks/LOG.md). Blocks and owners are those of ZeRO++'s quantised
gradients (Wang et al., ICLR 2024, section 3.3), which go by all-to-all so that a sum is rounded twice and not at every
hop of a ring; error feedback is ours.

On one rank delivered + residual is the float32 sum gradient + old residual, but for a rare last bit (rounding.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.blocks import LONGEST_BLOCK, Part
from hvdlm.gradients.codecs.blockwise import BlockCoding, BlockwiseCodec
from hvdlm.gradients.codecs.rounding import add_blocks, compile_for_cpu, count_bytes, count_scales, round_blocks
from hvdlm.gradients.exchange import Exchange


class Integer(BlockwiseCodec):
    """Sends large matrices as integers of a few bits; biases and other small tensors as they are."""

    # For two ranks both ways send as much; from three on all-gather sends more.
    most_ranks_of_all_gather = 2

    def __init__(self, bits: int, bucket: Bucket, settings: CompressionSection) -> None:
        """`bits`: 4 or 8."""
        super().__init__(bucket, settings, LONGEST_BLOCK)
        self._coding = _Rounded(bits)
        if bucket.buffer.is_cpu:
            compile_for_cpu(bits)

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        self.reduce_by_(self._coding, gradients, exchange)


class _Rounded(BlockCoding):
    """A float32 scale for each block, then integers."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def nbytes(self, part: Part) -> int:
        return 4 * count_scales(part) + count_bytes(part, self._bits)

    def encode(self, part: Part, gradients: Tensor, residual: Tensor, message: Tensor) -> None:
        round_blocks(part, self._bits, gradients, residual, *self._sections(part, message))

    def is_finite(self, part: Part, message: Tensor) -> bool:
        scales, _ = self._sections(part, message)
        return bool(scales.isfinite().all())

    def add(self, part: Part, message: Tensor, gradients: Tensor) -> None:
        add_blocks(part, self._bits, *self._sections(part, message), gradients)

    def _sections(self, part: Part, message: Tensor) -> tuple[Tensor, Tensor]:
        length = 4 * count_scales(part)
        return message[:length].view(torch.float32), message[length:]
