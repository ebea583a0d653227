"""The collective operations that codecs use, counted in bytes and seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hvdlm.comm.algorithm_probe import AlgorithmCost, prefers_ring
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.ring import Ring, SegmentEncoding
from hvdlm.comm.work import Work
from hvdlm.timing import Span, total_seconds


class _TimedEncoding:
    """A segment encoding, and the seconds that it has taken: the ring calls it in the midst of the exchange."""

    def __init__(self, encoding: SegmentEncoding) -> None:
        self._encoding = encoding
        self.nbytes = encoding.nbytes
        self.seconds = 0.0

    def encode(self, values: Tensor, message: Tensor, residual: Tensor | None) -> None:
        begin = time.perf_counter()
        self._encoding.encode(values, message, residual)
        self.seconds += time.perf_counter() - begin

    def decode(self, message: Tensor, values: Tensor) -> None:
        begin = time.perf_counter()
        self._encoding.decode(message, values)
        self.seconds += time.perf_counter() - begin


class Exchange:
    """Operations among all ranks of a communicator, counted in bytes and, where they block, in seconds."""

    def __init__(self, communicator: Communicator, ring: Ring | None, algorithm_costs: Sequence[AlgorithmCost]) -> None:
        """`ring`: sums and gathers; None: the engine does. `algorithm_costs`: what chooses between them by size."""
        self._communicator = communicator
        self._ring = ring
        self.algorithm_costs = algorithm_costs
        self.rank, self.size = communicator.rank, communicator.size
        self.has_ring = ring is not None
        # The communication thread and the backward pass, which gives buckets to the engine, both count
        self._counters = threading.Lock()
        self.wire_bytes = 0  # sent by this rank since `reset_counters`
        self.spans: list[Span] = []  # of operations since `reset_counters`
        self._encoding_seconds = 0.0  # of these spans
        self.first_sent: float | None = None  # time.perf_counter() of the first message since `reset_counters`

    def reset_counters(self) -> None:
        """Counts bytes and seconds from zero."""
        self.wire_bytes, self.spans, self.first_sent, self._encoding_seconds = 0, [], None, 0.0

    def prefers_ring(self, elements: int) -> bool:
        """Whether the ring, and not the engine, sums `elements` numbers."""
        return self._ring is not None and prefers_ring(self.algorithm_costs, elements)

    @property
    def seconds(self) -> float:
        """Sending, receiving and waiting since `reset_counters`, without what a ring's encoding has taken."""
        return total_seconds(self.spans) - self._encoding_seconds

    def all_reduce_(
        self,
        values: Tensor,
        encoding: SegmentEncoding | None = None,
        residual: Tensor | None = None,
        op: ReduceOp = ReduceOp.SUM,
    ) -> None:
        """Replaces `values` (contiguous, 1-D) by their sum over all ranks.

        float32 sums go by the ring where that costs less. Only the ring can send them by an `encoding`, whose error is
        kept in `residual` as `Ring.all_reduce_` says; raises ValueError where there is no ring.
        """
        with self.counted("all-reduce"):
            if encoding is not None and self._ring is None:
                raise ValueError("only a ring can sum what is sent by an encoding: ask has_ring first")
            can_ring = values.dtype is torch.float32 and op is ReduceOp.SUM
            if self._ring is not None and can_ring and (encoding or self.prefers_ring(values.numel())):
                timed = None if encoding is None else _TimedEncoding(encoding)
                self.count(self._ring.all_reduce_(values, timed, residual))
                self._encoding_seconds += timed.seconds if timed else 0.0
                return
            self._communicator.all_reduce_(values, op)
            self._count_all_reduce(values)

    def all_reduce_by_engine_async_(self, values: Tensor) -> Work[Any]:
        """Starts the engine's own all-reduce; several may be in progress, which the engine keeps in order."""
        self._note_first_message()
        self._count_all_reduce(values)
        return self._communicator.all_reduce_async_(values)

    def reduce_scatter_(self, values: Tensor) -> None:
        """Replaces this rank's part of `values` (float32, 1-D, contiguous, as many for each rank) by their sum over all
        ranks. What is elsewhere then means nothing.
        """
        with self.counted("reduce-scatter"):
            if self._ring is not None and self.prefers_ring(values.numel()):
                self.count(self._ring.reduce_scatter_(values))
                return
            self.count((self.size - 1) * values.nbytes // self.size)
            self._communicator.reduce_scatter_into(self.part_of(values), values)

    def all_gather_(self, values: Tensor) -> None:
        """Fills each rank's part of `values` (1-D, contiguous, as many for each rank) by what that rank has there."""
        with self.counted("all-gather"):
            if self._ring is not None and self.prefers_ring(values.numel()):
                self.count(self._ring.all_gather_(values))
                return
            self.count((self.size - 1) * values.nbytes // self.size)
            self._communicator.all_gather_into(values, self.part_of(values))

    def part_of(self, values: Tensor) -> Tensor:
        """This rank's part of a tensor that has as many elements for each: a view."""
        length = len(values) // self.size
        return values[self.rank * length :][:length]

    def all_gather(self, message: Tensor) -> list[Tensor]:
        """The messages (contiguous, 1-D) of all ranks, of one length and dtype, in the order of ranks."""
        with self.counted("all-gather"):
            self.count((self.size - 1) * message.nbytes)
            if self._ring is not None:  # it sleeps while it waits, where engines spin
                return [each.view(message.dtype) for each in self._ring.all_gather(message.view(torch.uint8))]
            return self._communicator.all_gather_v(message, [len(message)] * self.size)

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        """What each rank sends to this one, in the order of ranks, where `messages[r]` is sent to rank r.

        All messages of all ranks have one length and dtype.
        """
        return self.all_to_all_v(messages, [len(messages[self.rank])] * self.size)

    def all_to_all_v(self, messages: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """The same of messages whose lengths differ: rank r sends `lengths[r]` elements to this one."""
        with self.counted("all-to-all"):
            self.count(sum(messages[rank].nbytes for rank in range(self.size) if rank != self.rank))
            return self._communicator.all_to_all(messages, lengths)

    def _count_all_reduce(self, values: Tensor) -> None:
        """A ring sends each byte to the next rank twice, except this rank's part (Patarasuk & Yuan, JPDC 2009,
        section 3); engines may use other algorithms, but none sends less. Halves that an engine cannot sum are sent as
        float32.
        """
        is_half = values.dtype in (torch.float16, torch.bfloat16)
        is_widened = is_half and not self._communicator.supports(str(values.dtype).removeprefix("torch."))
        self.count(2 * (self.size - 1) * values.numel() * (4 if is_widened else values.itemsize) // self.size)

    def count(self, nbytes: int) -> None:
        """Adds to the bytes that were sent."""
        with self._counters:
            self.wire_bytes += nbytes

    def _note_first_message(self) -> None:
        with self._counters:
            if self.first_sent is None:
                self.first_sent = time.perf_counter()

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Counts the seconds of what happens within, an operation."""
        begin = time.perf_counter()
        self._note_first_message()
        yield
        self.spans.append(Span(name, begin, time.perf_counter()))
