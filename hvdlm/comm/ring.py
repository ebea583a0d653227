"""Our own segmented ring all-reduce over messages between neighbours (Patarasuk & Yuan, JPDC 2009).

`values` is cut into one chunk a rank and each chunk into segments. In `size - 1` hops every chunk travels once round
the ring and each rank adds its own part (reduce-scatter); in as many more the finished chunks travel round once again
(all-gather). Segments follow one another without waiting, so that a link is busy while a rank adds.

Sums are float32 whatever is sent: a `SegmentEncoding` encodes a segment into a message, and each hop decodes it, adds
to it and encodes the sum anew. The finished chunk is encoded once, by the rank that finished it, and all ranks, that
one too, keep the decoded message: so results are equal bit for bit on all ranks, and the order of additions depends on
nothing but the number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator, part_lengths
from hvdlm.comm.work import Work

# 256 KiB of float32: a few of them fit a core's cache, and on a 1 Gbit/s link one takes 2 ms.
SEGMENT = 64 * 1024

# Bytes: gathered messages start at multiples of this, so that they can be viewed as any dtype.
_ALIGNMENT = 16

# Receives posted at once: the neighbour can be that many segments ahead.
_POSTED_RECEIVES = 4


class SegmentEncoding(Protocol):
    """How a segment of float32 numbers is sent. `message` is uint8, of `nbytes(len(values))` bytes."""

    def nbytes(self, elements: int) -> int:
        """Bytes of the message for `elements` numbers."""

    def encode(self, values: Tensor, message: Tensor, residual: Tensor | None) -> None:
        """Adds `residual` to `values`, encodes the sums into `message`, and leaves sum - decoded in `residual`.

        Without `residual` nothing is added or kept. The residual of a sum that is not finite is zero.
        """

    def decode(self, message: Tensor, values: Tensor) -> None:
        """Decodes `message` into `values`."""


class _Segment(NamedTuple):
    chunk: int
    number: int  # within its chunk
    start: int  # in `values`
    stop: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def length(self) -> int:
        return self.stop - self.start


class Ring:
    """The ranks of a communicator as a ring. The engine must support "send"; one all-reduce runs at a time."""

    def __init__(self, communicator: Communicator, segment: int = SEGMENT) -> None:
        """`segment`: elements of one message."""
        self._size, self._rank = communicator.size, communicator.rank
        self._communicator = communicator
        self._segment = segment
        self._workspaces: dict[str, Tensor] = {}

    def all_reduce_(
        self, values: Tensor, encoding: SegmentEncoding | None = None, residual: Tensor | None = None
    ) -> int:
        """Replaces `values` (float32, 1-D, contiguous) by their sum over all ranks; returns the bytes this rank sent.

        `encoding`: how segments are sent; None: as float32. `residual`, of the shape of `values`: this rank's error of
        earlier sums, which is added to this one; afterwards the error of this rank's encodings. So, over all ranks,
        result + residuals = values + old residuals, up to the rounding of float32 additions.
        """
        if self._size == 1 or values.numel() == 0:
            return 0
        if encoding is None:
            return self._all_reduce_plain(values)
        return self._all_reduce_encoded(values, encoding, residual)

    def all_gather(self, message: Tensor) -> list[Tensor]:
        """The messages (uint8, 1-D, of one length) of all ranks in order: each is passed once round the ring."""
        length = len(message)
        stride = -(-length // _ALIGNMENT) * _ALIGNMENT
        gathered = message.new_empty(self._size * stride)
        gathered[self._rank * stride :][:length].copy_(message)
        self.all_gather_(gathered)
        return [gathered[rank * stride :][:length] for rank in range(self._size)]

    def all_gather_(self, values: Tensor) -> int:
        """Fills each rank's part of `values` (1-D, contiguous, as many elements for each) by what that rank has there.

        The second half of an all-reduce. Returns the bytes that this rank sent.
        """
        if self._size == 1 or values.numel() == 0:
            return 0
        gathered = values.view(torch.uint8)
        segments = self._segments(len(gathered), 4 * self._segment)
        sends = [self._communicator.send_async(gathered[each.span], self._right) for each in segments[self._rank]]
        received_segments = self._receive_segments(
            segments, self._size - 1, self._rank, lambda _, __, segment: gathered[segment.span]
        )
        for hop, _, received in received_segments:
            if hop < self._size - 2:
                sends.append(self._communicator.send_async(received, self._right))
        for work in sends:
            work.wait()
        return len(gathered) * (self._size - 1) // self._size

    def reduce_scatter_(self, values: Tensor) -> int:
        """Replaces this rank's part of `values` (float32, 1-D, contiguous, as many elements for each) by the sum over
        all ranks there; what it then holds elsewhere means nothing.

        The first half of an all-reduce, begun one chunk earlier, so that the chunk which a rank finishes is its own.
        Returns the bytes that this rank sent.
        """
        if self._size == 1 or values.numel() == 0:
            return 0
        first = self._left
        segments = self._segments(len(values), self._segment)
        scratch = self._workspace("scratch", (_POSTED_RECEIVES, self._segment), values)
        sends = [self._communicator.send_async(values[each.span], self._right) for each in segments[first]]

        def receive_buffer(message_index: int, hop: int, segment: _Segment) -> Tensor:
            return scratch[message_index % _POSTED_RECEIVES, : segment.length]

        for hop, segment, received in self._receive_segments(segments, self._size - 1, first, receive_buffer):
            values[segment.span] += received
            if hop < self._size - 2:
                sends.append(self._communicator.send_async(values[segment.span], self._right))
        for work in sends:
            work.wait()
        return values.nbytes * (self._size - 1) // self._size

    def _all_reduce_plain(self, values: Tensor) -> int:
        """Sends from `values` and receives finished chunks into it, without copies."""
        segments = self._segments(len(values), self._segment)
        scratch = self._workspace("scratch", (_POSTED_RECEIVES, self._segment), values)
        sends: dict[_Segment, Work[None]] = {}  # the newest send of each segment
        sent = 0

        def send(segment: _Segment) -> None:
            nonlocal sent
            sends[segment] = self._communicator.send_async(values[segment.span], self._right)
            sent += 4 * segment.length

        def receive_buffer(message_index: int, hop: int, segment: _Segment) -> Tensor:
            if hop < self._size - 1:
                return scratch[message_index % _POSTED_RECEIVES, : segment.length]
            sends[segment].wait()  # the partial sum may still be being sent from this memory
            return values[segment.span]

        for segment in segments[self._rank]:
            send(segment)
        for hop, segment, received in self._receive_segments(segments, self._last_hop + 1, self._rank, receive_buffer):
            if hop < self._size - 1:
                values[segment.span] += received
            if hop < self._last_hop:
                send(segment)
        for work in sends.values():
            work.wait()
        return sent

    def _all_reduce_encoded(self, values: Tensor, encoding: SegmentEncoding, residual: Tensor | None) -> int:
        segments = self._segments(len(values), self._segment)
        most = max(len(each) for each in segments)
        nbytes = encoding.nbytes(self._segment)
        received = self._workspace("received", (_POSTED_RECEIVES, nbytes), values, torch.uint8)
        finished = self._workspace("finished", (self._size, most, nbytes), values, torch.uint8)
        partial = self._workspace("partial", (self._size, most, nbytes), values, torch.uint8)
        decoded = self._workspace("decoded", (self._segment,), values)
        sends: list[Work[None]] = []
        sent = 0

        def send(message: Tensor) -> None:
            nonlocal sent
            sends.append(self._communicator.send_async(message, self._right))
            sent += len(message)

        def encode_and_send(segment: _Segment, messages: Tensor, is_finished: bool) -> None:
            message = messages[segment.chunk, segment.number, : encoding.nbytes(segment.length)]
            segment_values = values[segment.span]
            # A rank encodes each segment once, so its residual is added once
            encoding.encode(segment_values, message, None if residual is None else residual[segment.span])
            send(message)
            if is_finished:
                encoding.decode(message, segment_values)

        def receive_buffer(message_index: int, hop: int, segment: _Segment) -> Tensor:
            length = encoding.nbytes(segment.length)
            if hop < self._size - 1:
                return received[message_index % _POSTED_RECEIVES, :length]
            return finished[segment.chunk, segment.number, :length]

        for segment in segments[self._rank]:
            encode_and_send(segment, partial, is_finished=False)
        for hop, segment, message in self._receive_segments(segments, self._last_hop + 1, self._rank, receive_buffer):
            if hop < self._size - 1:
                partial_sum = decoded[: segment.length]
                encoding.decode(message, partial_sum)
                values[segment.span] += partial_sum
                is_finished = hop == self._size - 2
                encode_and_send(segment, finished if is_finished else partial, is_finished)
            else:
                encoding.decode(message, values[segment.span])
                if hop < self._last_hop:
                    send(message)
        for work in sends:
            work.wait()
        return sent

    @property
    def _left(self) -> int:
        return (self._rank - 1) % self._size

    @property
    def _right(self) -> int:
        return (self._rank + 1) % self._size

    @property
    def _last_hop(self) -> int:
        return 2 * self._size - 3

    def _segments(self, length: int, longest: int) -> list[list[_Segment]]:
        """The segments, of at most `longest` elements, of each chunk."""
        chunks, start = [], 0
        for chunk, chunk_length in enumerate(part_lengths(length, self._size)):
            starts = range(start, start + chunk_length, longest)
            end = start + chunk_length
            chunks.append([_Segment(chunk, index, at, min(at + longest, end)) for index, at in enumerate(starts)])
            start = end
        return chunks

    def _receive_segments(
        self,
        segments: list[list[_Segment]],
        hops: int,
        first: int,
        receive_buffer: Callable[[int, int, _Segment], Tensor],
    ) -> Iterator[tuple[int, _Segment, Tensor]]:
        """Hop, segment and content of every message from the left neighbour, in order, with some receives posted ahead.

        At hop h this rank sends chunk `first` - h on and receives the one before it, which it will send at hop h + 1.
        """
        expected = [(hop, segment) for hop in range(hops) for segment in segments[(first - hop - 1) % self._size]]
        pending: deque[Work[Tensor]] = deque()
        posted = 0
        for message_index, (hop, segment) in enumerate(expected):
            # Receives are posted at most one hop ahead: the plain ring receives a segment into the memory from which it
            # was sent, and that send has started size - 1 hops before
            while posted < min(message_index + _POSTED_RECEIVES, len(expected)) and expected[posted][0] <= hop + 1:
                buffer = receive_buffer(posted, *expected[posted])
                pending.append(self._communicator.receive_async_(buffer, self._left))
                posted += 1
            yield hop, segment, pending.popleft().wait()

    def _workspace(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that is kept from call to call: allocating fresh pages costs more than the arithmetic on them."""
        wanted = torch.Size(shape)
        dtype = dtype or like.dtype
        buffer = self._workspaces.get(name)
        if buffer is None or buffer.numel() < wanted.numel() or buffer.dtype != dtype or buffer.device != like.device:
            buffer = self._workspaces[name] = torch.empty(wanted.numel(), dtype=dtype, device=like.device)
        return buffer[: wanted.numel()].view(wanted)
