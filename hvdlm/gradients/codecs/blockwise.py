"""What codecs have in common that turn a block of a matrix into a few bytes: who sends what to whom, and what is owed.

Among few ranks each sends its blocks to all. Among more, each rank owns a part of them: the others send it theirs of
that part, it adds them to all of its own gradients there, encodes the sum in its turn and sends that to all. So a rank
sends 2 n (P-1)/P bytes, not n (P-1), and a sum is encoded twice however many ranks there are. What the second encoding
drops waits in the residual of the owner. Biases and other small tensors travel as they are, with the blocks.

Over all ranks, delivered + residuals = gradients + old residuals, but for the rounding of float32 additions of several
ranks' numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.blocks import Part, cut_into_parts
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.exchange import Exchange


class BlockCoding(ABC):
    """How the blocks of a part of a bucket travel. `message` is uint8, of `nbytes(part)` bytes or more."""

    @abstractmethod
    def nbytes(self, part: Part) -> int:
        """Bytes of a message about the blocks of a part."""

    @abstractmethod
    def encode(self, part: Part, gradients: Tensor, residual: Tensor, message: Tensor) -> None:
        """Writes what stands for blocks of `gradients` + `residual` into `message`, and leaves the rest in `residual`.

        `gradients` gets the old residual, so that all can be undone.
        """

    @abstractmethod
    def is_finite(self, part: Part, message: Tensor) -> bool:
        """Whether all numbers were that the message stands for."""

    @abstractmethod
    def add(self, part: Part, message: Tensor, gradients: Tensor) -> None:
        """Adds what a message stands for to `gradients`."""


class BlockwiseCodec(Codec):
    """Keeps a residual, and reduces by what a subclass says stands for blocks."""

    # Up to so many ranks send their blocks to one another.
    most_ranks_of_all_gather: int

    def __init__(self, bucket: Bucket, settings: CompressionSection, block: int) -> None:
        """`block`: numbers in a block, at most `LONGEST_BLOCK`."""
        super().__init__(bucket, settings)
        self._block = block
        self._residual = torch.zeros_like(bucket.buffer)
        self._parts: list[Part] = []

    def state(self) -> dict[str, Tensor]:
        return {"residual": self._residual} if self.settings.error_feedback else {}

    def reduce_by_(self, coding: BlockCoding, gradients: Tensor, exchange: Exchange) -> None:
        """Replaces `gradients` by the sum of what stands for all ranks'."""
        if not self.settings.error_feedback:
            self._residual.zero_()
        if exchange.size <= self.most_ranks_of_all_gather:
            self._reduce_by_all_gather(coding, gradients, exchange)
        else:
            self._reduce_by_owners(coding, gradients, exchange)

    def _reduce_by_all_gather(self, coding: BlockCoding, gradients: Tensor, exchange: Exchange) -> None:
        (bucket,) = self._cut(1)
        message = self._message(coding, bucket, _nbytes(coding, bucket), gradients)
        arrived = exchange.all_gather(message)
        self._deliver(coding, [bucket] * exchange.size, arrived, gradients)

    def _reduce_by_owners(self, coding: BlockCoding, gradients: Tensor, exchange: Exchange) -> None:
        parts = self._cut(exchange.size)
        own = parts[exchange.rank]
        nbytes = max(_nbytes(coding, part) for part in parts)
        to_myself = gradients.new_zeros(nbytes, dtype=torch.uint8)
        messages = [to_myself if part is own else self._message(coding, part, nbytes, gradients) for part in parts]
        for rank, arrived in enumerate(exchange.all_to_all(messages)):
            if rank != exchange.rank:
                _add(coding, own, arrived, gradients)
        summary = self._message(coding, own, nbytes, gradients)
        self._deliver(coding, parts, exchange.all_gather(summary), gradients)

    def _cut(self, count: int) -> list[Part]:
        if len(self._parts) != count:
            self._parts = cut_into_parts(self.bucket, self._block, count)
        return self._parts

    def _message(self, coding: BlockCoding, part: Part, nbytes: int, gradients: Tensor) -> Tensor:
        """What this rank tells of a part, whose old residual lies in `gradients` from here to `_deliver`."""
        message = gradients.new_zeros(nbytes, dtype=torch.uint8)
        dense, blocks = _sections(part, message)
        owed = self._residual[part.dense]
        torch.add(gradients[part.dense], owed, out=dense)
        gradients[part.dense] = owed
        self._residual[part.dense] = 0
        coding.encode(part, gradients, self._residual, blocks)
        return message

    def _deliver(
        self, coding: BlockCoding, parts: Sequence[Part], messages: Sequence[Tensor], gradients: Tensor
    ) -> None:
        """Replaces `gradients` by the sum of messages in their order, or, if one is not finite, by NaN.

        A gradient that is not finite is one that is not used: nothing of this step is then owed, on any rank.
        """
        if all(_is_finite(coding, part, message) for part, message in zip(parts, messages, strict=True)):
            gradients.zero_()
            for part, message in zip(parts, messages, strict=True):
                _add(coding, part, message, gradients)
            return
        self._residual.copy_(gradients)
        gradients.fill_(math.nan)


def _nbytes(coding: BlockCoding, part: Part) -> int:
    """Bytes of a message about a part, a multiple of 4: of several in one tensor each begins where a float32 may."""
    return -(-(4 * len(part.dense) + coding.nbytes(part)) // 4) * 4


def _sections(part: Part, message: Tensor) -> tuple[Tensor, Tensor]:
    """Dense elements as float32, and what stands for the blocks."""
    length = 4 * len(part.dense)
    return message[:length].view(torch.float32), message[length:]


def _is_finite(coding: BlockCoding, part: Part, message: Tensor) -> bool:
    dense, blocks = _sections(part, message)
    return bool(dense.isfinite().all()) and coding.is_finite(part, blocks)


def _add(coding: BlockCoding, part: Part, message: Tensor, gradients: Tensor) -> None:
    dense, blocks = _sections(part, message)
    gradients.index_add_(0, part.dense, dense)
    coding.add(part, blocks, gradients)
