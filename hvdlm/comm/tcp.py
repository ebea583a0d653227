"""Ranks that exchange messages over TCP connections of our own: beside Horovod over Gloo, which has none.

Messages start at once. Collectives run on a communication thread, one after the other in the order of their submission,
and are made of messages between neighbours on connections of their own; all-to-all alone connects all pairs. So the
messages of one communicator meet neither its collectives nor those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from hvdlm.arrays import as_array
from hvdlm.comm.communicator import Communicator, part_lengths
from hvdlm.comm.death_watch import DeathWatch
from hvdlm.comm.failure import end_process, result_within
from hvdlm.comm.groups import group_by_color
from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.tcp_connections import Endpoint, TcpConnections
from hvdlm.comm.work import Work

T = TypeVar("T")

# Bytes that a broadcast passes on at a time.
_PIECE = 256 * 1024


class TcpCommunicator(Communicator):
    """Some ranks of another communicator."""

    engine = "tcp"
    capabilities = frozenset({"send", "split"})

    def __init__(self, parent: Communicator, color: int, key: int, timeout: float) -> None:
        """The ranks of `parent` that give the same `color`, ordered by `key`, then by rank; `timeout`: seconds that one
        waits for another. Collective."""
        super().__init__()
        self._timeout = timeout
        self._listen(parent._watch if isinstance(parent, TcpCommunicator) else None)
        everyone = parent.all_gather_object((color, key, self._messages.endpoint, self._collective.endpoint))
        members = group_by_color([each[:2] for each in everyone])[color]
        self._open(
            members.index(parent.rank), [everyone[each][2] for each in members], [everyone[each][3] for each in members]
        )
        self._locate()

    def _listen(self, watch: DeathWatch | None) -> None:
        """Makes this rank's ends of connections, which end when `watch` notices a death."""
        self._watch = watch
        self._messages, self._collective = TcpConnections(), TcpConnections()
        if watch is not None:
            watch.add(self._messages)
            watch.add(self._collective)

    def _open(self, rank: int, messages: Sequence[Endpoint], collective: Sequence[Endpoint]) -> None:
        """`messages` and `collective`: where all ranks listen for them, in their order."""
        self.rank, self.size = rank, len(messages)
        self._messages.open(rank, messages)
        self._collective.open(rank, collective)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hvdlm-tcp")

    def _split(self, color: int, key: int) -> Communicator:
        return TcpCommunicator(self, color, key, self._timeout)

    def abort(self, reason: str) -> NoReturn:
        end_process(reason)  # the launcher ends the other ranks when one exits non-zero

    def _close(self) -> None:
        self._submit(lambda: None).wait()
        self._thread.shutdown()
        self._messages.close()
        self._collective.close()

    def _revoke(self) -> None:
        if self._watch is not None:
            self._watch.break_()

    def _abandon(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _can_reduce(self, dtype: torch.dtype, op: ReduceOp) -> bool:
        return dtype in (torch.float32, torch.int32, torch.int64)

    def _all_reduce(self, flat: Tensor, op: ReduceOp) -> Work[None]:
        """By a ring: each rank sums one part, and all ranks end with its bits."""

        def run() -> None:
            parts = flat.split(part_lengths(len(flat), self.size))
            self._reduce_to_owners(parts, op)
            self._pass_round(parts)

        return self._submit(run)

    def _reduce_scatter(self, part: Tensor, values: Tensor, op: ReduceOp) -> Work[None]:
        own = values[self.rank * len(part) :][: len(part)]
        is_within = own.data_ptr() == part.data_ptr()
        parts = (values if is_within else values.clone()).split(len(part))

        def run() -> None:
            self._reduce_to_owners(parts, op)
            if not is_within:
                part.copy_(parts[self.rank])

        return self._submit(run)

    def _all_gather(self, data: Tensor, lengths: Sequence[int]) -> Work[Tensor]:
        gathered = data.new_empty(sum(lengths))
        parts = gathered.split(list(lengths))
        parts[self.rank].copy_(data)

        def run() -> Tensor:
            self._pass_round(parts)
            return gathered

        return self._submit(run)

    def _all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> Work[list[Tensor]]:
        received = [parts[self.rank].new_empty(length) for length in lengths]
        received[self.rank].copy_(parts[self.rank])

        def run() -> list[Tensor]:
            # Each rank begins with the next one, so that not all send to the same rank at a time
            peers = [((self.rank - each) % self.size, (self.rank + each) % self.size) for each in range(1, self.size)]
            works = [self._start_receive(received[source], source) for source, _ in peers]
            works += [self._start_send(parts[target], target) for _, target in peers]
            for work in works:
                work.wait()
            return received

        return self._submit(run)

    def _broadcast(self, data: Tensor, root: int) -> Work[None]:
        """Round the ring from `root`, a piece at a time."""

        def run() -> None:
            sends = []
            for piece in data.split(_PIECE):
                if self.rank != root:
                    self._start_receive(piece, self._left).wait()
                if self._right != root:
                    sends.append(self._start_send(piece, self._right))
            for work in sends:
                work.wait()

        return self._submit(run)

    def _send(self, data: Tensor, destination: int) -> Work[None]:
        return self._work(self._messages.send(_bytes(data), destination), f"rank {destination} to receive")

    def _receive(self, data: Tensor, source: int) -> Work[None]:
        return self._work(self._messages.receive(_bytes(data), source), f"rank {source} to send")

    # ---- parts of collectives, for the communication thread

    @property
    def _left(self) -> int:
        return (self.rank - 1) % self.size

    @property
    def _right(self) -> int:
        return (self.rank + 1) % self.size

    def _reduce_to_owners(self, parts: Sequence[Tensor], op: ReduceOp) -> None:
        """Replaces `parts[rank]` by its reduction over all ranks, and other parts by reductions over some of them.

        In each of `size - 1` hops a part goes to the next rank, which adds its own.
        """
        for hop in range(self.size - 1):
            own = parts[(self.rank - hop - 2) % self.size]
            received = torch.empty_like(own)
            self._exchange(parts[(self.rank - hop - 1) % self.size], received)
            torch.add(own, received, out=own) if op is ReduceOp.SUM else torch.maximum(own, received, out=own)

    def _pass_round(self, parts: Sequence[Tensor]) -> None:
        """Replaces each part by that of the rank whose number it has, in `size - 1` hops."""
        for hop in range(self.size - 1):
            self._exchange(parts[(self.rank - hop) % self.size], parts[(self.rank - hop - 1) % self.size])

    def _exchange(self, sent: Tensor, received: Tensor) -> None:
        """A message to the right neighbour, and one from the left."""
        works = [self._start_receive(received, self._left), self._start_send(sent, self._right)]
        for work in works:
            work.wait()

    def _start_send(self, data: Tensor, destination: int) -> Work[None]:
        if len(data) == 0:
            return Work.done(None)
        return self._work(self._collective.send(_bytes(data), destination), f"rank {destination} to receive")

    def _start_receive(self, data: Tensor, source: int) -> Work[None]:
        if len(data) == 0:
            return Work.done(None)
        return self._work(self._collective.receive(_bytes(data), source), f"rank {source} to send")

    def _submit(self, collective: Callable[[], T]) -> Work[T]:
        """Queues a collective for the communication thread, whose waits have deadlines of their own."""
        return Work(self._thread.submit(collective).result)

    def _work(self, message: Future[None], what: str) -> Work[None]:
        return Work(lambda: result_within(message, self._timeout, self.rank, what))


def _bytes(data: Tensor) -> memoryview:
    return as_array(data.view(torch.uint8)).data
