"""Codec `topk`: of each block of a matrix the numbers of largest magnitude travel, as fp16; the rest waits.

A block is at most 256 numbers, so that a place in it takes one byte, messages have one size on all ranks, and one pass
over memory suffices. What was not chosen, and what rounding to fp16 took from what was, is added to the next step's
gradients (feedback.py; Lin et al., "Deep Gradient Compression", ICLR 2018, section 3).

Up to three ranks send their choice to one another. Among more, each rank owns a part of the blocks: the others send it
their choice of that part, it adds them to all of its own gradients there, chooses in its turn and sends that to all. So
a rank sends 2 k (P-1)/P entries, not k (P-1). What the second choice drops waits in the residual of the owner.

Over all ranks, delivered + residuals = gradients + old residuals, but for the rounding of float32 additions of several
ranks' numbers. On one rank delivered + residual is the float32 sum gradient + old residual, bit for bit: a number less
its fp16 rounding is itself a float32 number, so no bit is lost, however small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.blocks import LONGEST_BLOCK, Part, cut_into_parts
from hvdlm.gradients.codecs.cast import ScaledCast
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.selection import add_chosen, choose, compile_for_cpu
from hvdlm.gradients.exchange import Exchange
from hvdlm.gradients.feedback import reduce_whole_

# For three ranks all-gather sends half as much again as the way by owners, but nobody waits for a second message.
_MOST_RANKS_OF_ALL_GATHER = 3

_FP16 = ScaledCast(torch.float16)


class TopK(Codec):
    """Sends the share `compression.density` of each large matrix; biases and other small tensors as they are."""

    def __init__(self, bucket: Bucket, settings: CompressionSection) -> None:
        super().__init__(bucket, settings)
        self._kept = max(1, int(LONGEST_BLOCK * settings.density))
        self._block = min(LONGEST_BLOCK, round(self._kept / settings.density))
        self._residual = torch.zeros_like(bucket.buffer)
        self._parts: list[Part] = []
        if bucket.buffer.is_cpu:
            compile_for_cpu()

    def reduce_(self, gradients: Tensor, exchange: Exchange, step: int) -> None:
        if not self.settings.error_feedback:
            self._residual.zero_()
        kept = self._kept_at(step)
        if kept == self._block:
            reduce_whole_(gradients, self._residual, exchange)
        elif exchange.size <= _MOST_RANKS_OF_ALL_GATHER:
            self._reduce_by_all_gather(gradients, exchange, kept)
        else:
            self._reduce_by_owners(gradients, exchange, kept)

    def state(self) -> dict[str, Tensor]:
        return {"residual": self._residual} if self.settings.error_feedback else {}

    def _kept_at(self, step: int) -> int:
        """Numbers of a block that travel: all for `compression.warmup_steps`, then exponentially fewer for as many."""
        warmup = self.settings.warmup_steps
        progress = min(max(step / warmup - 1, 0.0), 1.0) if warmup else 1.0
        return max(self._kept, round(self._block * math.pow(self.settings.density, progress)))

    def _reduce_by_all_gather(self, gradients: Tensor, exchange: Exchange, kept: int) -> None:
        (bucket,) = self._cut(1)
        message = self._message(bucket, kept, _nbytes(bucket, kept), gradients)
        self._deliver([_Choice(bucket, kept, arrived) for arrived in exchange.all_gather(message)], gradients)

    def _reduce_by_owners(self, gradients: Tensor, exchange: Exchange, kept: int) -> None:
        parts = self._cut(exchange.size)
        own = parts[exchange.rank]
        nbytes = max(_nbytes(part, kept) for part in parts)
        to_myself = gradients.new_zeros(nbytes, dtype=torch.uint8)
        messages = [to_myself if part is own else self._message(part, kept, nbytes, gradients) for part in parts]
        for rank, arrived in enumerate(exchange.all_to_all(messages)):
            if rank != exchange.rank:
                _Choice(own, kept, arrived).add_to_(gradients)
        summary = self._message(own, kept, nbytes, gradients)
        gathered = zip(parts, exchange.all_gather(summary), strict=True)
        self._deliver([_Choice(part, kept, arrived) for part, arrived in gathered], gradients)

    def _cut(self, count: int) -> list[Part]:
        if len(self._parts) != count:
            self._parts = cut_into_parts(self.bucket, self._block, count)
        return self._parts

    def _message(self, part: Part, kept: int, nbytes: int, gradients: Tensor) -> Tensor:
        """What this rank tells of a part, whose old residual lies in `gradients` from here to `_deliver`."""
        message = gradients.new_zeros(nbytes, dtype=torch.uint8)
        dense, numbers, places = _sections(part, kept, message)
        owed = self._residual[part.dense]
        torch.add(gradients[part.dense], owed, out=dense)
        gradients[part.dense] = owed
        self._residual[part.dense] = 0
        values, chosen = choose(part, kept, gradients, self._residual)
        places.copy_(chosen)
        if len(values):
            _FP16.encode(values, numbers)
            _FP16.decode(numbers, values)
        add_chosen(part, kept, values.neg_(), chosen, self._residual)
        return message

    def _deliver(self, choices: Sequence[_Choice], gradients: Tensor) -> None:
        """Replaces `gradients` by the sum of choices in their order, or, if one is not finite, by NaN.

        A gradient that is not finite is one that is not used: nothing of this step is then owed, on any rank.
        """
        if all(choice.is_finite() for choice in choices):
            gradients.zero_()
            for choice in choices:
                choice.add_to_(gradients)
            return
        self._residual.copy_(gradients)
        gradients.fill_(math.nan)


class _Choice:
    """What a rank has sent of a part: the dense elements, and of each block the numbers chosen."""

    def __init__(self, part: Part, kept: int, message: Tensor) -> None:
        self._part, self._kept = part, kept
        self._dense, numbers, self._places = _sections(part, kept, message)
        self._values = torch.empty_like(self._places, dtype=torch.float32)
        if len(self._values):
            _FP16.decode(numbers, self._values)

    def is_finite(self) -> bool:
        return bool(self._dense.isfinite().all()) and bool(self._values.isfinite().all())

    def add_to_(self, gradients: Tensor) -> None:
        gradients.index_add_(0, self._part.dense, self._dense)
        add_chosen(self._part, self._kept, self._values, self._places, gradients)


def _lengths(part: Part, kept: int) -> tuple[int, int, int]:
    """Bytes of a message's sections: dense elements as float32, values as fp16 with their scale, places."""
    entries = part.entries(kept)
    return 4 * len(part.dense), _FP16.nbytes(entries), entries


def _nbytes(part: Part, kept: int) -> int:
    """Bytes of a message about a part, a multiple of 4: of several in one tensor each begins where a float32 may."""
    return -(-sum(_lengths(part, kept)) // 4) * 4


def _sections(part: Part, kept: int, message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sections of a message; a message may be longer."""
    lengths = _lengths(part, kept)
    dense, numbers, places = message[: sum(lengths)].split(lengths)
    return dense.view(torch.float32), numbers, places
