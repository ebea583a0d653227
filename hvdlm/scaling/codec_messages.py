"""The messages that a codec exchanges for a bucket on any number of ranks.

The codec runs once, in this process, with an exchange that records messages and sends none. So forecasts follow the
code of every codec, those of users included, without a formula for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.ring import SEGMENT, SegmentEncoding
from hvdlm.config import CompressionSection
from hvdlm.config.server import no_messages_to_owners
from hvdlm.errors import HvdlmError
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.registry import AUTO, codec_factory
from hvdlm.gradients.exchange import Exchange

# For taller matrices the codec runs on two smaller buckets, and the size of its messages is extrapolated: it is linear
# in the number of rows.
_MAX_ROWS = 1024

Shapes = Sequence[Sequence[int]]


class Message(NamedTuple):
    """One collective operation, as seen by one rank."""

    kind: str  # "all-reduce", "all-gather", "all-to-all" or "push"
    nbytes: float  # sent by the rank, and received by it
    hops: int  # messages in sequence, each of which needs the one before
    longest: float  # most bytes of a segment; 0: a message is not split

    @property
    def segment(self) -> float:
        """Bytes that are sent at once, and are passed on when they have arrived."""
        return min(self.longest, self.nbytes / self.hops)


def messages(codec: str, shapes: Shapes, ranks: int, settings: CompressionSection) -> list[Message]:
    """What one rank exchanges for a bucket of parameters of these shapes, after the codec's warm-up.

    Raises HvdlmError for an unknown codec.
    """
    if ranks == 1:
        return []
    return _extrapolated(shapes, lambda each: _record_messages(codec, each, ranks, settings))


def can_push(codec: str) -> bool:
    """Whether a codec has messages to parameter servers. Raises HvdlmError for an unknown one."""
    return codec != AUTO and codec_factory(codec)(_random_bucket(((1,),)), CompressionSection()).has_messages_to_owners


def pushed_bytes(codec: str, shapes: Shapes, settings: CompressionSection) -> float:
    """What a worker sends to all parameter servers together for a bucket.

    Raises HvdlmError for an unknown codec, and one without messages to servers.
    """
    (message,) = _extrapolated(shapes, lambda each: _record_push(codec, each, settings))
    return message.nbytes


def _extrapolated(shapes: Shapes, record: Callable[[tuple[tuple[int, ...], ...]], Sequence[Message]]) -> list[Message]:
    tallest = max((shape[0] for shape in shapes if len(shape) > 1), default=0)
    if tallest <= _MAX_ROWS:
        return list(record(_as_tuples(shapes)))
    share = _MAX_ROWS / tallest
    small, smaller = (record(_with_rows(shapes, each)) for each in (share, share / 2))
    growth = (1 - share) / (share - share / 2)
    return [
        one._replace(nbytes=one.nbytes + (one.nbytes - other.nbytes) * growth)
        for one, other in zip(small, smaller, strict=True)
    ]


@cache
def _record_messages(
    codec: str, shapes: tuple[tuple[int, ...], ...], ranks: int, settings: CompressionSection
) -> tuple[Message, ...]:
    bucket, exchange = _random_bucket(shapes), _RecordingExchange(ranks)
    codec_factory(codec)(bucket, settings).reduce_(bucket.buffer, exchange, _after_warmup(settings))
    return tuple(exchange.messages)


@cache
def _record_push(codec: str, shapes: tuple[tuple[int, ...], ...], settings: CompressionSection) -> tuple[Message, ...]:
    bucket = _random_bucket(shapes)
    made = codec_factory(codec)(bucket, settings)
    if not made.has_messages_to_owners:
        raise HvdlmError(no_messages_to_owners(codec))
    # As if there were one server: parts have the bytes of the whole, but for what fills up the last one
    messages = made.messages_to_owners(bucket.buffer, 1, _after_warmup(settings))
    return (Message("push", sum(map(len, messages)), 1, 0),)


def _after_warmup(settings: CompressionSection) -> int:
    """A step in which a codec sends no more than in any later one."""
    return 2 * settings.warmup_steps + 1


def _random_bucket(shapes: tuple[tuple[int, ...], ...]) -> Bucket:
    bucket = Bucket({str(index): nn.Parameter(torch.empty(shape)) for index, shape in enumerate(shapes)})
    bucket.buffer.normal_(generator=torch.Generator().manual_seed(0))
    return bucket


class _RecordingExchange(Exchange):
    """The exchange of rank 0 of `size`, as if all other ranks sent the same messages."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size
        self.has_ring = True
        self.messages: list[Message] = []

    def all_reduce_(
        self,
        values: Tensor,
        encoding: SegmentEncoding | None = None,
        residual: Tensor | None = None,
        op: ReduceOp = ReduceOp.SUM,
    ) -> None:
        nbytes = encoding.nbytes(values.numel()) if encoding else values.nbytes
        segment = encoding.nbytes(SEGMENT) if encoding else values.itemsize * SEGMENT
        self._record("all-reduce", 2 * (self.size - 1) / self.size * nbytes, 2 * (self.size - 1), segment)
        if op is ReduceOp.SUM:
            values.mul_(self.size)

    def all_gather(self, message: Tensor) -> list[Tensor]:
        self._record("all-gather", (self.size - 1) * message.nbytes, self.size - 1, 4 * SEGMENT)
        return [message] * self.size

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        self._record("all-to-all", sum(message.nbytes for message in messages[1:]), 1, 0)
        return [messages[0]] * self.size

    def _record(self, kind: str, nbytes: float, hops: int, longest: float) -> None:
        self.messages.append(Message(kind, nbytes, hops, longest))


def _as_tuples(shapes: Shapes) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for shape in shapes)


def _with_rows(shapes: Shapes, share: float) -> tuple[tuple[int, ...], ...]:
    """The shapes with a share of the rows of every matrix."""
    return tuple((max(1, round(shape[0] * share)), *shape[1:]) if len(shape) > 1 else tuple(shape) for shape in shapes)
