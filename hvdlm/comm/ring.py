"""Our own segmented ring all-reduce over messages between neighbours (Patarasuk & Yuan, JPDC 2009).

`values` is cut into one chunk a rank and each chunk into segments. In `size - 1` hops every chunk travels once round
the ring and each rank adds its own part (reduce-scatter); in as many more the finished chunks travel round once again
(all-gather). Segments follow one another without waiting, so that a link is busy while a rank adds.

Sums are float32 whatever travels: an `Encoding` turns a segment into the message that stands for it, and it is decoded,
added to and encoded anew at each hop. The finished chunk is encoded once, by the rank that finished it, and all ranks,
that one too, keep what its message says: so results are equal bit for bit on all ranks, and the order of additions
depends on nothing but the number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator, Work, part_lengths

# 256 KiB of float32: a few of them fit a core's cache, and on a 1 Gbit/s link one takes 2 ms.
SEGMENT = 64 * 1024

# Bytes: what is gathered begins where numbers of any dtype may.
_ALIGNMENT = 16

# Receives that wait for their message at once: the neighbour can be that many segments ahead.
_AHEAD = 4


class Encoding(Protocol):
    """How a segment of float32 numbers travels. `message` is uint8, of `nbytes(len(values))` bytes."""

    def nbytes(self, elements: int) -> int:
        """Bytes of the message for so many numbers."""

    def encode(self, values: Tensor, message: Tensor, errors: Tensor | None) -> None:
        """Adds `errors` to `values`, writes what stands for the sums into `message`, and what it lacks into `errors`.

        Without `errors` nothing is added. Of a sum that is not finite nothing is lacking.
        """

    def decode(self, message: Tensor, values: Tensor) -> None:
        """Writes what `message` stands for into `values`."""


class _Segment(NamedTuple):
    chunk: int
    place: int  # within its chunk
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
        """`segment`: elements that travel in one message."""
        self._size, self._rank = communicator.size, communicator.rank
        self._communicator = communicator
        self._segment = segment
        self._workspaces: dict[str, Tensor] = {}

    def all_reduce_(self, values: Tensor, encoding: Encoding | None = None, errors: Tensor | None = None) -> int:
        """Replaces `values` (float32, 1-D, contiguous) by their sum over all ranks; returns the bytes this rank sent.

        `encoding`: what travels; None: the numbers themselves. `errors`, like `values`: what is still owed, which goes
        with the sum; then holds what an encoding on this rank has taken from finite numbers. So, over all ranks, result
        + errors = values + old errors, up to the rounding of float32 additions.
        """
        if self._size == 1 or values.numel() == 0:
            return 0
        if encoding is None:
            return self._all_reduce_plain(values)
        return self._all_reduce_encoded(values, encoding, errors)

    def all_gather(self, message: Tensor) -> list[Tensor]:
        """The messages (uint8, 1-D) of all ranks, of one length, in their order: each travels once round the ring."""
        length = len(message)
        stride = -(-length // _ALIGNMENT) * _ALIGNMENT
        gathered = message.new_empty(self._size * stride)
        gathered[self._rank * stride :][:length].copy_(message)
        segments = self._cut(len(gathered), 4 * self._segment)
        leaving = [self._communicator.send_async(gathered[each.span], self._right) for each in segments[self._rank]]
        arrivals = self._arrivals(segments, self._size - 1, lambda _, __, segment: gathered[segment.span])
        for hop, _, received in arrivals:
            if hop < self._size - 2:
                leaving.append(self._communicator.send_async(received, self._right))
        for work in leaving:
            work.wait()
        return [gathered[rank * stride :][:length] for rank in range(self._size)]

    def _all_reduce_plain(self, values: Tensor) -> int:
        """Numbers leave from where they lie in `values`, and finished ones arrive there."""
        segments = self._cut(len(values), self._segment)
        scratch = self._workspace("scratch", (_AHEAD, self._segment), values)
        leaving: dict[_Segment, Work[None]] = {}  # the newest send of each segment
        sent = 0

        def send(segment: _Segment) -> None:
            nonlocal sent
            leaving[segment] = self._communicator.send_async(values[segment.span], self._right)
            sent += 4 * segment.length

        def room_for(number: int, hop: int, segment: _Segment) -> Tensor:
            if hop < self._size - 1:
                return scratch[number % _AHEAD, : segment.length]
            leaving[segment].wait()  # the partial sum that lies where the finished one is to be
            return values[segment.span]

        for segment in segments[self._rank]:
            send(segment)
        for hop, segment, received in self._arrivals(segments, self._last_hop + 1, room_for):
            if hop < self._size - 1:
                values[segment.span] += received
            if hop < self._last_hop:
                send(segment)
        for work in leaving.values():
            work.wait()
        return sent

    def _all_reduce_encoded(self, values: Tensor, encoding: Encoding, errors: Tensor | None) -> int:
        segments = self._cut(len(values), self._segment)
        most = max(len(each) for each in segments)
        nbytes = encoding.nbytes(self._segment)
        arriving = self._workspace("arriving", (_AHEAD, nbytes), values, torch.uint8)
        finished = self._workspace("finished", (self._size, most, nbytes), values, torch.uint8)
        partial = self._workspace("partial", (self._size, most, nbytes), values, torch.uint8)
        decoded = self._workspace("decoded", (self._segment,), values)
        leaving: list[Work[None]] = []
        sent = 0

        def send(message: Tensor) -> None:
            nonlocal sent
            leaving.append(self._communicator.send_async(message, self._right))
            sent += len(message)

        def encode_and_send(segment: _Segment, store: Tensor, is_finished: bool) -> None:
            message = store[segment.chunk, segment.place, : encoding.nbytes(segment.length)]
            numbers = values[segment.span]
            # A rank encodes each segment once: so what it owes joins the sum once
            encoding.encode(numbers, message, None if errors is None else errors[segment.span])
            send(message)
            if is_finished:
                encoding.decode(message, numbers)

        def room_for(number: int, hop: int, segment: _Segment) -> Tensor:
            length = encoding.nbytes(segment.length)
            if hop < self._size - 1:
                return arriving[number % _AHEAD, :length]
            return finished[segment.chunk, segment.place, :length]

        for segment in segments[self._rank]:
            encode_and_send(segment, partial, is_finished=False)
        for hop, segment, message in self._arrivals(segments, self._last_hop + 1, room_for):
            if hop < self._size - 1:
                stands_for = decoded[: segment.length]
                encoding.decode(message, stands_for)
                values[segment.span] += stands_for
                is_finished = hop == self._size - 2
                encode_and_send(segment, finished if is_finished else partial, is_finished)
            else:
                encoding.decode(message, values[segment.span])
                if hop < self._last_hop:
                    send(message)
        for work in leaving:
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

    def _cut(self, length: int, most: int) -> list[list[_Segment]]:
        """The segments, of at most `most` elements, of each chunk."""
        chunks, start = [], 0
        for chunk, chunk_length in enumerate(part_lengths(length, self._size)):
            starts = range(start, start + chunk_length, most)
            end = start + chunk_length
            chunks.append([_Segment(chunk, place, at, min(at + most, end)) for place, at in enumerate(starts)])
            start = end
        return chunks

    def _arrivals(
        self, segments: list[list[_Segment]], hops: int, room_for: Callable[[int, int, _Segment], Tensor]
    ) -> Iterator[tuple[int, _Segment, Tensor]]:
        """Hop, segment and content of every message from the left, in their order, with some receives ahead.

        At hop h this rank sends chunk rank - h on and receives the one before it, which it will send at hop h + 1.
        """
        expected = [(hop, segment) for hop in range(hops) for segment in segments[(self._rank - hop - 1) % self._size]]
        under_way: deque[Work[Tensor]] = deque()
        posted = 0
        for number, (hop, segment) in enumerate(expected):
            # Never past the next hop's messages: what they replace has not been sent yet (see room_for)
            while posted < min(number + _AHEAD, len(expected)) and expected[posted][0] <= hop + 1:
                room = room_for(posted, *expected[posted])
                under_way.append(self._communicator.receive_async_(room, self._left))
                posted += 1
            yield hop, segment, under_way.popleft().wait()

    def _workspace(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that is kept from call to call: fresh pages cost more than what is done with them."""
        wanted = torch.Size(shape)
        dtype = dtype or like.dtype
        kept = self._workspaces.get(name)
        if kept is None or kept.numel() < wanted.numel() or kept.dtype != dtype or kept.device != like.device:
            kept = self._workspaces[name] = torch.empty(wanted.numel(), dtype=dtype, device=like.device)
        return kept[: wanted.numel()].view(wanted)
