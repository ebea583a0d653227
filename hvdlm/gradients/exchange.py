"""How the messages of codecs travel, and what that took: the part of a `Communicator` that a codec sees."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator, ReduceOp, Work
from hvdlm.comm.ring import Encoding, Ring
from hvdlm.gradients.span import Span, total_seconds
from hvdlm.gradients.trial import Trial, prefers_ring

# Elements: as large a message as Open MPI sends off without asking, where they are bytes (see comm/launch.py).
_PIECE = 256 * 1024


class Exchange:
    """Operations among all ranks of a communicator, counted in bytes and, where they block, in seconds."""

    def __init__(self, communicator: Communicator, ring: Ring | None, trials: Sequence[Trial]) -> None:
        """`ring`: what sums and gathers; None: the engine does. `trials`: at which sizes the ring's sums cost less."""
        self._communicator = communicator
        self._ring = ring
        self.trials = trials
        self.rank, self.size = communicator.rank, communicator.size
        self.has_ring = ring is not None
        self.wire_bytes = 0  # sent by this rank
        self.spans: list[Span] = []  # of sending, receiving and waiting, since `clear`
        self.first_sent: float | None = None  # time.perf_counter() of the first message since `clear`

    def clear(self) -> None:
        """Starts counting anew."""
        self.wire_bytes, self.spans, self.first_sent = 0, [], None

    def prefers_ring(self, elements: int) -> bool:
        """Whether the ring sums so many numbers, and not the engine."""
        return self._ring is not None and prefers_ring(self.trials, elements)

    @property
    def seconds(self) -> float:
        """Sending, receiving and waiting, since `clear`."""
        return total_seconds(self.spans)

    def all_reduce_(
        self,
        values: Tensor,
        encoding: Encoding | None = None,
        errors: Tensor | None = None,
        op: ReduceOp = ReduceOp.SUM,
    ) -> None:
        """Replaces `values` (contiguous, 1-D) by their sum over all ranks.

        With a ring, which costs less for some sizes and the only way for encodings, float32 sums may travel by an
        `encoding`, whose `errors` are carried on as `Ring.all_reduce_` says.
        """
        with self._counted("all-reduce"):
            if encoding is not None and self._ring is None:
                raise ValueError("only a ring can sum what travels by an encoding: ask has_ring first")
            can_ring = values.dtype is torch.float32 and op is ReduceOp.SUM
            if self._ring is not None and can_ring and (encoding or self.prefers_ring(values.numel())):
                self.wire_bytes += self._ring.all_reduce_(values, encoding, errors)
                return
            self._communicator.all_reduce_(values, op)
            self._count_all_reduce(values)

    def all_reduce_by_engine_async_(self, values: Tensor) -> Work[Any]:
        """Starts the engine's own all-reduce, of which several may be under way: engines order and join them."""
        if self.first_sent is None:
            self.first_sent = time.perf_counter()
        self._count_all_reduce(values)
        return self._communicator.all_reduce_async_(values)

    def all_gather(self, message: Tensor) -> list[Tensor]:
        """The messages (contiguous, 1-D) of all ranks, of one length and dtype, in the order of ranks."""
        with self._counted("all-gather"):
            self.wire_bytes += (self.size - 1) * message.nbytes
            if self._ring is not None:  # which sleeps while it waits, where engines spin
                return [each.view(message.dtype) for each in self._ring.all_gather(message.view(torch.uint8))]
            return self._communicator.all_gather_v(message, [len(message)] * self.size)

    def all_to_all(self, messages: Sequence[Tensor]) -> list[Tensor]:
        """What each rank has for this one, in the order of ranks, when `messages[r]` goes to rank r.

        All messages of all ranks have one length and dtype. Engines without point-to-point messages send all to all.
        """
        with self._counted("all-to-all"):
            if not self._communicator.supports("send"):
                rows = self._communicator.all_gather(torch.stack(list(messages)))  # (from, to, length)
                self.wire_bytes += (self.size - 1) * self.size * messages[0].nbytes
                return list(rows[:, self.rank])
            others = [rank for rank in range(self.size) if rank != self.rank]
            received = [torch.empty_like(messages[self.rank]) for _ in range(self.size)]
            received[self.rank].copy_(messages[self.rank])
            works: list[Work[Any]] = []
            for rank in others:
                for out, room in zip(messages[rank].split(_PIECE), received[rank].split(_PIECE), strict=True):
                    send = partial(self._communicator.send_async, out, rank)
                    receive = partial(self._communicator.receive_async_, room, rank)
                    # NCCL works off what goes between two ranks in order: one sends first, the other receives first
                    works += [start() for start in ((send, receive) if self.rank < rank else (receive, send))]
            for work in works:
                work.wait()
            self.wire_bytes += sum(messages[rank].nbytes for rank in others)
            return received

    def _count_all_reduce(self, values: Tensor) -> None:
        """A ring sends each byte on to the next rank twice, less the part that is its own (Patarasuk & Yuan, JPDC 2009,
        section 3); engines may do otherwise, but not with less. Halves that an engine cannot sum travel as float32.
        """
        is_half = values.dtype in (torch.float16, torch.bfloat16)
        is_widened = is_half and not self._communicator.supports(str(values.dtype).removeprefix("torch."))
        self.wire_bytes += 2 * (self.size - 1) * values.numel() * (4 if is_widened else values.itemsize) // self.size

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        if self.first_sent is None:
            self.first_sent = begin
        yield
        self.spans.append(Span(name, begin, time.perf_counter()))
