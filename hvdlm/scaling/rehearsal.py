"""What a codec would send for a bucket among so many ranks: it runs once, alone, against an exchange that only counts.

So the forecast of a codec follows from the codec itself, one of the user's own included, and from no formula beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvdlm.comm.communicator import ReduceOp
from hvdlm.comm.ring import SEGMENT, Encoding
from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.registry import codec_factory
from hvdlm.gradients.exchange import Exchange

# Rows of a matrix beyond which a bucket is rehearsed at two smaller scales and continued: messages grow evenly with the
# rows of all matrices.
_MOST_ROWS = 1024

Shapes = Sequence[Sequence[int]]


class Message(NamedTuple):
    """One exchange among all ranks, as one rank sees it."""

    kind: str  # "all-reduce", "all-gather" or "all-to-all"
    nbytes: float  # that a rank sends, and receives
    hops: int  # messages that follow one another, each made of the one before
    longest: float  # bytes that travel as one at most; 0: all that go to one rank

    @property
    def segment(self) -> float:
        """Bytes of it that travel as one, and are sent on when they have come."""
        return min(self.longest, self.nbytes / self.hops)


def messages(codec: str, shapes: Shapes, ranks: int, settings: CompressionSection) -> list[Message]:
    """What one rank exchanges for a bucket of parameters of these shapes, once the codec is warm.

    Raises HvdlmError for an unknown codec.
    """
    if ranks == 1:
        return []
    tallest = max((shape[0] for shape in shapes if len(shape) > 1), default=0)
    if tallest <= _MOST_ROWS:
        return list(_rehearse(codec, _frozen(shapes), ranks, settings))
    share = _MOST_ROWS / tallest
    short, shorter = (_rehearse(codec, _cut(shapes, each), ranks, settings) for each in (share, share / 2))
    growth = (1 - share) / (share - share / 2)
    return [
        more._replace(nbytes=more.nbytes + (more.nbytes - less.nbytes) * growth)
        for more, less in zip(short, shorter, strict=True)
    ]


@cache
def _rehearse(
    codec: str, shapes: tuple[tuple[int, ...], ...], ranks: int, settings: CompressionSection
) -> tuple[Message, ...]:
    generator = torch.Generator().manual_seed(0)
    parameters = {str(index): nn.Parameter(torch.empty(shape)) for index, shape in enumerate(shapes)}
    bucket = Bucket(parameters)
    bucket.buffer.normal_(generator=generator)
    exchange = _CountingExchange(ranks)
    codec_factory(codec)(bucket, settings).reduce_(bucket.buffer, exchange, 2 * settings.warmup_steps + 1)
    return tuple(exchange.messages)


class _CountingExchange(Exchange):
    """Rank 0 of `size`, where the others always say what this one says."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size
        self.has_ring = True
        self.messages: list[Message] = []

    def all_reduce_(
        self,
        values: Tensor,
        encoding: Encoding | None = None,
        errors: Tensor | None = None,
        op: ReduceOp = ReduceOp.SUM,
    ) -> None:
        nbytes = encoding.nbytes(values.numel()) if encoding else values.nbytes
        segment = encoding.nbytes(SEGMENT) if encoding else values.itemsize * SEGMENT
        self._note("all-reduce", 2 * (self.size - 1) / self.size * nbytes, 2 * (self.size - 1), segment)
        if op is ReduceOp.SUM:
            values.mul_(self.size)

    def all_gather(self, message: Tensor) -> list[Tensor]:
        self._note("all-gather", (self.size - 1) * message.nbytes, self.size - 1, 4 * SEGMENT)
        return [message] * self.size

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        self._note("all-to-all", sum(message.nbytes for message in messages[1:]), 1, 0)
        return [messages[0]] * self.size

    def _note(self, kind: str, nbytes: float, hops: int, longest: float) -> None:
        self.messages.append(Message(kind, nbytes, hops, longest))


def _frozen(shapes: Shapes) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for shape in shapes)


def _cut(shapes: Shapes, share: float) -> tuple[tuple[int, ...], ...]:
    """All matrices with such a share of their rows."""
    return tuple((max(1, round(shape[0] * share)), *shape[1:]) if len(shape) > 1 else tuple(shape) for shape in shapes)
