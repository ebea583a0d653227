"""What block codecs share: how a bucket is split into blocks, which rank sends which blocks where, and residuals.

Among few ranks each sends its blocks to all. Among more, each rank owns a part of the blocks: the others send it theirs
of that part, it adds them to its own gradients there, encodes the sum and sends that to all. So of P ranks, whose
encoded buckets have n bytes, each sends 2 n (P-1)/P bytes, not n (P-1), and a sum is encoded twice. What the second
encoding drops stays in the residual of the owner. Biases and other small tensors are sent as float32, with the blocks.

Over all ranks, delivered + residuals = gradients + old residuals, up to the rounding of float32 additions of several
ranks' numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvdlm.arrays import as_array
from hvdlm.comm.communicator import part_lengths
from hvdlm.config import CompressionSection
from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.codecs.codec import Codec, dense_messages_, uses_loops
from hvdlm.gradients.exchange import Exchange

# An index within a block is sent as one byte.
LONGEST_BLOCK = 256

# Tensors of at most so many elements are sent dense: compressing them would save next to nothing.
_SMALL = 4096


def is_large_matrix(parameter: nn.Parameter) -> bool:
    """Whether the gradient of `parameter` is compressed: those of biases, norms and small tensors are not."""
    return parameter.dim() >= 2 and parameter.numel() > _SMALL


class Part(NamedTuple):
    """Consecutive blocks of a bucket, and some of its elements outside blocks."""

    block: int  # elements of a block; the last block of a span may have fewer
    spans: Tensor  # (n, 2) int64, on the CPU: start and stop in the buffer of consecutive blocks
    dense: Tensor  # (m,) int64: indices in the buffer of elements that are sent as float32

    def chosen_count(self, kept: int) -> int:
        """Elements chosen where each block gives its `kept` largest, or all it has."""
        lengths = self.spans[:, 1] - self.spans[:, 0]
        return int((lengths // self.block * min(kept, self.block) + (lengths % self.block).clamp(max=kept)).sum())

    def moved(self, by: int) -> Part:
        """The same in a buffer in which all lies `by` elements further back."""
        return Part(self.block, self.spans + by, self.dense + by)

    def zero_blocks_(self, values: Tensor) -> None:
        """Zeros the blocks of a buffer."""
        for start, stop in self.spans.tolist():
            values[start:stop].zero_()

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Start and stop in the buffer, and block length, of each run of blocks of one length, in order."""
        for start, stop in self.spans.tolist():
            whole = stop - (stop - start) % self.block
            for first, end, length in ((start, whole, self.block), (whole, stop, stop - whole)):
                if first < end:
                    yield first, end, length


def split_into_parts(bucket: Bucket, block: int, count: int) -> list[Part]:
    """Splits `bucket` into `count` parts of equally many blocks; the last parts may have fewer, or none."""
    compressed: list[tuple[int, int]] = []
    dense: list[tuple[int, int]] = []
    start = 0
    for parameter in bucket.parameters:
        stop = start + parameter.numel()
        (compressed if is_large_matrix(parameter) else dense).append((start, stop))
        start = stop

    blocks_a_part = -(-sum(-(-(stop - start) // block) for start, stop in compressed) // count)
    spans: list[list[tuple[int, int]]] = [[]]
    room = blocks_a_part
    for start, stop in compressed:
        while start < stop:
            if room == 0:
                spans.append([])
                room = blocks_a_part
            end = min(stop, start + room * block)
            spans[-1].append((start, end))
            room -= -(-(end - start) // block)
            start = end
    spans += [[] for _ in range(count - len(spans))]

    indices = torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(*span) for span in dense)])
    pieces = indices.to(bucket.buffer.device).split(part_lengths(len(indices), count))
    return [
        Part(block, torch.tensor(own, dtype=torch.int64).reshape(-1, 2), piece)
        for own, piece in zip(spans, pieces, strict=True)
    ]


def split_evenly(bucket: Bucket, block: int, count: int) -> list[Part]:
    """Splits `bucket`, as long as a multiple of `count`, into parts of as many elements, whose blocks do not cross."""
    length = len(bucket.buffer) // count
    spans: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    dense: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int64)] for _ in range(count)]
    start = 0
    for parameter in bucket.parameters:
        stop = start + parameter.numel()
        for owner in range(start // length, -(-stop // length)):
            span = max(start, owner * length), min(stop, (owner + 1) * length)
            if is_large_matrix(parameter):
                spans[owner].append(span)
            else:
                dense[owner].append(torch.arange(*span))
        start = stop
    device = bucket.buffer.device
    return [
        Part(block, torch.tensor(own, dtype=torch.int64).reshape(-1, 2), torch.cat(indices).to(device))
        for own, indices in zip(spans, dense, strict=True)
    ]


class BlockEncoding(ABC):
    """How the blocks of a part are encoded. `message` is uint8, of `nbytes(part)` bytes or more."""

    @abstractmethod
    def nbytes(self, part: Part) -> int:
        """Bytes of the encoded blocks of a part."""

    @abstractmethod
    def encode(self, part: Part, gradients: Tensor, residual: Tensor, message: Tensor) -> None:
        """Encodes the blocks of `gradients` + `residual` into `message`, and leaves their error in `residual`.

        `gradients` then holds a copy of the old residual, by which `_decode` restores it if the step is not applied.
        """

    @abstractmethod
    def is_finite(self, part: Part, message: Tensor) -> Tensor:
        """Whether all encoded numbers were finite: a bool scalar on their device."""

    @abstractmethod
    def add(self, part: Part, messages: Sequence[Tensor], gradients: Tensor, from_zero: bool) -> None:
        """Decodes `messages` and adds them, in order, to the blocks of `gradients`; `from_zero`: to zeros there."""


class BlockwiseCodec(Codec):
    """Keeps a residual, and sums blocks by the `BlockEncoding` of a subclass."""

    # Up to this number of ranks, all-gather; beyond, owners of parts.
    most_ranks_of_all_gather: int

    def __init__(self, bucket: Bucket, settings: CompressionSection, block: int) -> None:
        """`block`: elements of a block, at most `LONGEST_BLOCK`."""
        super().__init__(bucket, settings)
        self._block = block
        self._residual = torch.zeros_like(bucket.buffer)
        self._parts: list[Part] = []
        self._owned: list[Part] = []  # of as many elements for each rank
        self._own_before: Tensor | None = None  # the residual of what this rank owns, before the last sum

    def state(self) -> dict[str, Tensor]:
        return {"residual": self._residual} if self.settings.error_feedback else {}

    def reduce_by_(self, encoding: BlockEncoding, gradients: Tensor, exchange: Exchange) -> None:
        """Replaces `gradients` by the sum of all ranks' decoded gradients."""
        if not self.settings.error_feedback:
            self._residual.zero_()
        if exchange.size <= self.most_ranks_of_all_gather:
            self._reduce_by_all_gather(encoding, gradients, exchange)
        else:
            self._reduce_by_owners(encoding, gradients, exchange)

    def _reduce_by_all_gather(self, encoding: BlockEncoding, gradients: Tensor, exchange: Exchange) -> None:
        (bucket,) = self._split(1)
        message = self._encode(encoding, bucket, message_bytes(encoding, bucket), gradients)
        self._decode(encoding, [(bucket, exchange.all_gather(message))], gradients)

    def reduce_to_owners_by_(self, encoding: BlockEncoding, gradients: Tensor, exchange: Exchange) -> None:
        """Replaces this rank's part of `gradients`, of which each rank has as many, by the sum of its own numbers and
        what the others' are decoded to.
        """
        if not self.settings.error_feedback:
            self._residual.zero_()
        own, residual = exchange.part_of(gradients), exchange.part_of(self._residual)
        # Of an earlier layout: an owner leaves none
        has_loops = uses_loops(gradients)
        self._own_before = residual.clone() if has_loops and as_array(residual).any() else None
        if self._own_before is not None or not has_loops:
            own.add_(residual)
            residual.zero_()
        self._sum_at_owner_(encoding, self._split_evenly(exchange.size), gradients, exchange)

    def messages_to_owners_by(self, encoding: BlockEncoding, gradients: Tensor, owners: int) -> list[Tensor]:
        """`Codec.messages_to_owners`; the old residual is then in `gradients`."""
        if not self.settings.error_feedback:
            self._residual.zero_()
        self._own_before = None
        parts = self._split_evenly(owners)
        return [self._encode(encoding, part, message_bytes(encoding, part), gradients) for part in parts]

    def dense_messages_to_owners(self, gradients: Tensor, owners: int) -> list[Tensor]:
        """The same without encoding."""
        if not self.settings.error_feedback:
            self._residual.zero_()
        self._own_before = None
        self._split_evenly(owners)
        return dense_messages_(gradients, self._residual, owners)

    def add_message_by_(self, encoding: BlockEncoding, message: Tensor, own: Tensor, owner: int, owners: int) -> None:
        """`Codec.add_message_`."""
        part = self._split_evenly(owners)[owner].moved(-owner * len(own))
        dense, blocks = sections_of(part, message)
        own.index_add_(0, part.dense, dense)
        encoding.add(part, [blocks], own, from_zero=False)

    def _split_evenly(self, owners: int) -> list[Part]:
        if len(self._owned) != owners:
            self._owned = split_evenly(self.bucket, self._block, owners)
        return self._owned

    def can_take_back(self, gradients: Tensor) -> bool:
        return uses_loops(gradients)

    def take_back_(self, gradients: Tensor, rank: int) -> None:
        for owner, part in enumerate(self._owned):
            if owner != rank:
                self._residual[part.dense] = gradients[part.dense]
                for start, stop in part.spans.tolist():
                    self._residual[start:stop] = gradients[start:stop]
        if self._own_before is not None:
            length = len(gradients) // len(self._owned)
            self._residual[rank * length :][:length] = self._own_before

    def _reduce_by_owners(self, encoding: BlockEncoding, gradients: Tensor, exchange: Exchange) -> None:
        parts = self._split(exchange.size)
        nbytes = self._sum_at_owner_(encoding, parts, gradients, exchange)
        own_sum = self._encode(encoding, parts[exchange.rank], nbytes, gradients)
        sums = [[message] for message in exchange.all_gather(own_sum)]
        self._decode(encoding, list(zip(parts, sums, strict=True)), gradients)

    def _sum_at_owner_(
        self, encoding: BlockEncoding, parts: Sequence[Part], gradients: Tensor, exchange: Exchange
    ) -> int:
        """Adds to this rank's part what the others send of it; returns the bytes of a message."""
        own = parts[exchange.rank]
        nbytes = max(message_bytes(encoding, part) for part in parts)
        unused = gradients.new_zeros(nbytes, dtype=torch.uint8)  # this rank adds its own numbers unrounded
        messages = [unused if part is own else self._encode(encoding, part, nbytes, gradients) for part in parts]
        for rank, message in enumerate(exchange.all_to_all(messages)):
            if rank != exchange.rank:
                dense, blocks = sections_of(own, message)
                gradients.index_add_(0, own.dense, dense)
                encoding.add(own, [blocks], gradients, from_zero=False)
        return nbytes

    def _split(self, count: int) -> list[Part]:
        if len(self._parts) != count:
            self._parts = split_into_parts(self.bucket, self._block, count)
        return self._parts

    def _encode(self, encoding: BlockEncoding, part: Part, nbytes: int, gradients: Tensor) -> Tensor:
        """This rank's message about a part, whose old residual lies in `gradients` from here to `_decode`."""
        message = gradients.new_zeros(nbytes, dtype=torch.uint8)
        dense, blocks = sections_of(part, message)
        residual = self._residual[part.dense]
        torch.add(gradients[part.dense], residual, out=dense)
        gradients[part.dense] = residual
        self._residual.index_fill_(0, part.dense, 0)
        encoding.encode(part, gradients, self._residual, blocks)
        return message

    def _decode(
        self, encoding: BlockEncoding, received: Sequence[tuple[Part, Sequence[Tensor]]], gradients: Tensor
    ) -> None:
        """Replaces each part of `gradients` by the sum of its messages in order, or, if one is not finite, all by NaN.

        A step with NaN is not applied, so all ranks then restore the residuals that they had before it.
        """
        is_finite = (_is_finite(encoding, part, message) for part, messages in received for message in messages)
        if uses_loops(gradients):
            if all(map(bool, is_finite)):
                _set_to_sums(encoding, received, gradients)
            else:
                self._residual.copy_(gradients)
                gradients.fill_(math.nan)
            return
        all_finite = torch.stack(list(is_finite)).all()
        self._residual.copy_(torch.where(all_finite, self._residual, gradients))
        _set_to_sums(encoding, received, gradients)
        gradients.copy_(torch.where(all_finite, gradients, math.nan))


def _set_to_sums(encoding: BlockEncoding, received: Sequence[tuple[Part, Sequence[Tensor]]], gradients: Tensor) -> None:
    for part, messages in received:
        denses, blocks = zip(*(sections_of(part, message) for message in messages), strict=True)
        gradients.index_fill_(0, part.dense, 0)
        for dense in denses:
            gradients.index_add_(0, part.dense, dense)
        encoding.add(part, blocks, gradients, from_zero=True)


def message_bytes(encoding: BlockEncoding, part: Part) -> int:
    """Bytes of a message about a part, a multiple of 4: several in one tensor all start aligned for float32."""
    return -(-(4 * len(part.dense) + encoding.nbytes(part)) // 4) * 4


def sections_of(part: Part, message: Tensor) -> tuple[Tensor, Tensor]:
    """The dense elements as float32, and the encoded blocks."""
    length = 4 * len(part.dense)
    return message[:length].view(torch.float32), message[length:]


def _is_finite(encoding: BlockEncoding, part: Part, message: Tensor) -> Tensor:
    dense, blocks = sections_of(part, message)
    return dense.isfinite().all() & encoding.is_finite(part, blocks)
