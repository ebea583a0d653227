"""The one interface through which ranks communicate: `Communicator`, `Work`, `ReduceOp`.

This file handles what all engines share: dtypes, strided and empty tensors, tensors on a device that the engine cannot
reach, Python objects, which ranks share a node. An engine (solo.py, mpi.py, horovod.py, torch.py) adds primitives that
see only contiguous one-dimensional tensors of dtypes that it supports. Data that is only moved is sent as bytes.
"""

from __future__ import annotations

import functools
import logging
import math
import socket
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from hvdlm.comm.activity import Activity
from hvdlm.comm.failure import wait_until
from hvdlm.comm.payload import as_rows, copy_back, pickled, unpickled
from hvdlm.comm.primitives import Primitives, ReduceOp
from hvdlm.comm.work import Work

logger = logging.getLogger(__name__)

T = TypeVar("T")

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8})

# The dtype in which a tensor is reduced where an engine cannot reduce its own; the result is rounded once.
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.uint8: torch.int32}


def part_lengths(length: int, parts: int) -> list[int]:
    """Lengths of `parts` contiguous pieces of `length` elements; the first `length % parts` have one more."""
    return [length // parts + (index < length % parts) for index in range(parts)]


class Communicator(Primitives):
    """A group of ranks 0 .. size-1, each in a process of its own.

    Every rank calls the same collective operations in the same order; `root`, `destination` and `source` are ranks of
    this communicator. Operations that end in `_` change their tensor in place. dtypes are float32, float16, bfloat16,
    int32, int64 and uint8; shapes, strides and emptiness are free. Each tensor operation has an `_async` form that
    returns a `Work`. `activity`: what this rank is doing.

    Capabilities are asked for by name with `supports`: "float16" and "bfloat16" (summed natively; other engines sum
    them as float32 and round once at the end), "send" (`send` and `receive_`), "split", "cuda" (GPU tensors need no
    staging through host memory), "shrink" (ranks that have died can be left out), "join" (others can come instead).
    """

    local_rank: int
    local_size: int
    node_rank: int
    node_count: int
    hosts: list[str]
    capabilities: frozenset[str]
    _timeout: float = math.inf  # seconds that a rank waits for another
    is_inline = False  # whether the thread that calls a collective runs it, also where an engine would queue it
    is_new = False  # whether this rank was started to join others, and is a group of its own until `regroup_`
    hosts_have_changed = False  # whether other ranks wait to join, or some are to leave; one rank alone may know

    def __init__(self) -> None:
        self.activity = Activity()
        self._groups: list[Communicator] = []  # that were split off
        self._is_closed = False
        # Called when ranks have been left out, on all others; they may communicate
        self.after_regroup: list[Callable[[], object]] = []

    # ---- collective operations

    def all_reduce_(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        """Replaces `tensor` on every rank by its reduction over all ranks. Shapes and dtypes are equal on all."""
        return self.all_reduce_async_(tensor, op).wait()

    def all_reduce_async_(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work[Tensor]:
        _check_dtype(tensor)
        if tensor.numel() == 0:
            return Work.done(tensor)
        flat = self._reducible(tensor, op)
        return self._all_reduce(flat, op).then(lambda _: copy_back(flat, tensor))

    def reduce_scatter(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        """This rank's part, 1-D, of the reduction of `tensor`, seen as flat and cut by `part_lengths`."""
        return self.reduce_scatter_async(tensor, op).wait()

    def reduce_scatter_async(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work[Tensor]:
        _check_dtype(tensor)
        if tensor.numel() == 0:
            return Work.done(tensor.detach().reshape(-1).clone())
        lengths = part_lengths(tensor.numel(), self.size)
        values = self._reducible(tensor, op)
        if min(lengths) < max(lengths):  # the engine knows equal parts
            padded = values.new_zeros(self.size, max(lengths))
            for row, piece in zip(padded, values.split(lengths), strict=True):
                row[: len(piece)] = piece
            values = padded.view(-1)
        part = values.new_empty(max(lengths))
        work = self._reduce_scatter(part, values, op)
        return work.then(lambda _: part[: lengths[self.rank]].to(device=tensor.device, dtype=tensor.dtype))

    def reduce_scatter_into(self, part: Tensor, values: Tensor, op: ReduceOp = ReduceOp.SUM) -> Tensor:
        """Fills `part`, n numbers, by this rank's part of the reduction of `values`, size x n numbers of one dtype.

        Both are contiguous and 1-D. `part` may be that part of `values`, and what stands elsewhere in `values` then
        means nothing; otherwise they stay as they are.
        """
        return self.reduce_scatter_into_async(part, values, op).wait()

    def reduce_scatter_into_async(self, part: Tensor, values: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work[Tensor]:
        self._check_parts(part, values)
        if part.numel() == 0:
            return Work.done(part)
        reducible = self._reducible(values, op)
        own = part.detach()
        if reducible.data_ptr() != values.data_ptr():
            own = reducible[self.rank * len(part) :][: len(part)]
        return self._reduce_scatter(own, reducible, op).then(lambda _: copy_back(own, part))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, (size, *shape), in the order of ranks. Shapes are equal on all ranks."""
        return self.all_gather_async(tensor).wait()

    def all_gather_async(self, tensor: Tensor) -> Work[Tensor]:
        return self.all_gather_v_async(tensor, [tensor.shape[0] if tensor.dim() else 1] * self.size).then(
            lambda parts: torch.stack([part.reshape(tensor.shape) for part in parts])
        )

    def all_gather_into(self, values: Tensor, part: Tensor) -> Tensor:
        """Fills `values`, size x n elements, by the parts of all ranks, n elements each, in the order of ranks.

        Both are contiguous, 1-D and of one dtype. `part` may be this rank's part of `values`.
        """
        return self.all_gather_into_async(values, part).wait()

    def all_gather_into_async(self, values: Tensor, part: Tensor) -> Work[Tensor]:
        self._check_parts(part, values)
        if part.numel() == 0:
            return Work.done(values)
        reachable = self._reachable(values.detach())
        own = self._reachable(part.detach())
        work = self._all_gather_into(reachable.view(torch.uint8), own.view(torch.uint8))
        return work.then(lambda _: copy_back(reachable, values))

    def all_gather_v(self, tensor: Tensor, lengths: Sequence[int] | None = None) -> list[Tensor]:
        """The tensors of all ranks, whose first dimensions may differ: `lengths[r]` on rank r.

        Without `lengths` they are exchanged first, which costs one more message.
        """
        return self.all_gather_v_async(tensor, lengths).wait()

    def all_gather_v_async(self, tensor: Tensor, lengths: Sequence[int] | None = None) -> Work[list[Tensor]]:
        _check_dtype(tensor)
        row_shape = tensor.shape[1:]
        own_length = tensor.shape[0] if tensor.dim() else 1
        if lengths is None:
            lengths = self.all_gather(torch.tensor([own_length])).flatten().tolist()
        if lengths[self.rank] != own_length:
            raise ValueError(f"lengths[{self.rank}] = {lengths[self.rank]}, but the tensor has {own_length} rows")
        row_bytes = row_shape.numel() * tensor.element_size()
        byte_lengths = [length * row_bytes for length in lengths]
        if sum(byte_lengths) == 0:
            return Work.done([tensor.new_empty(length, *row_shape) for length in lengths])
        work = self._all_gather(self._as_bytes(tensor), byte_lengths)
        return work.then(lambda gathered: as_rows(gathered.split(byte_lengths), lengths, tensor))

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int] | None = None) -> list[Tensor]:
        """What each rank has for this one, in the order of ranks: `parts[r]` is sent to rank r.

        All parts have one dtype and, but for the first dimension, one shape. `lengths[r]`: rows of what rank r sends to
        this one; without `lengths` they are exchanged first, which costs one more message.
        """
        return self.all_to_all_async(parts, lengths).wait()

    def all_to_all_async(self, parts: Sequence[Tensor], lengths: Sequence[int] | None = None) -> Work[list[Tensor]]:
        if len(parts) != self.size:
            raise ValueError(f"{len(parts)} parts for {self.size} ranks: one for each is needed")
        like = parts[self.rank]
        _check_dtype(like)
        row_shape = like.shape[1:]
        if any(part.dtype != like.dtype or part.shape[1:] != row_shape for part in parts):
            raise ValueError("parts for different ranks differ in dtype, or in shape beyond the first dimension")
        own = [part.shape[0] if part.dim() else 1 for part in parts]
        if lengths is None:
            lengths = [int(each) for each in self.all_to_all([torch.tensor([n]) for n in own], [1] * self.size)]
        if lengths[self.rank] != own[self.rank]:
            raise ValueError(f"lengths[{self.rank}] = {lengths[self.rank]}, but that part has {own[self.rank]} rows")
        row_bytes = row_shape.numel() * like.element_size()
        if row_bytes == 0:
            return Work.done([like.new_empty(length, *row_shape) for length in lengths])
        work = self._all_to_all([self._as_bytes(part) for part in parts], [length * row_bytes for length in lengths])
        return work.then(lambda received: as_rows(received, lengths, like))

    def broadcast_(self, tensor: Tensor, root: int = 0) -> Tensor:
        """Replaces `tensor` on every rank by that of `root`. Shapes and dtypes are equal on all ranks."""
        return self.broadcast_async_(tensor, root).wait()

    def broadcast_async_(self, tensor: Tensor, root: int = 0) -> Work[Tensor]:
        _check_dtype(tensor)
        self._check_rank(root)
        if tensor.numel() == 0:
            return Work.done(tensor)
        data = self._as_bytes(tensor)
        return self._broadcast(data, root).then(lambda _: copy_back(data.view(tensor.dtype), tensor))

    # ---- point-to-point operations

    def send(self, tensor: Tensor, destination: int) -> None:
        """Sends `tensor` to one rank, which calls `receive_` with one of the same shape and dtype."""
        self.send_async(tensor, destination).wait()

    def send_async(self, tensor: Tensor, destination: int) -> Work[None]:
        self._check_point_to_point(tensor, destination)
        if tensor.numel() == 0:
            return Work.done(None)
        return self._send(self._as_bytes(tensor), destination)

    def receive_(self, tensor: Tensor, source: int) -> Tensor:
        """Replaces `tensor` by the one that `source` sends; messages of one sender arrive in their order."""
        return self.receive_async_(tensor, source).wait()

    def receive_async_(self, tensor: Tensor, source: int) -> Work[Tensor]:
        self._check_point_to_point(tensor, source)
        if tensor.numel() == 0:
            return Work.done(tensor)
        data = self._as_bytes(tensor)
        return self._receive(data, source).then(lambda _: copy_back(data.view(tensor.dtype), tensor))

    # ---- objects, barrier, groups, abort and close

    def broadcast_object(self, value: T, root: int = 0) -> T:
        """`value` of `root`, on every rank. Anything that pickle takes."""
        data = pickled(value) if self.rank == root else torch.empty(0, dtype=torch.uint8)
        length = self.broadcast_(torch.tensor([data.numel()]), root)
        if self.rank != root:
            data = torch.empty(int(length), dtype=torch.uint8)
        result: T = unpickled(self.broadcast_(data, root))
        return result

    def all_gather_object(self, value: T) -> list[T]:
        """`value` of every rank, in the order of ranks. Anything that pickle takes."""
        return [unpickled(data) for data in self.all_gather_v(pickled(value))]

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.all_reduce_(torch.zeros(1, dtype=torch.int32))

    def supports(self, capability: str) -> bool:
        """Whether the engine has one of the capabilities that the class docstring lists."""
        return capability in self.capabilities

    def arrival(self, device: torch.device) -> Work[None]:
        """Work that ends when `device` has done what its current stream has been given so far.

        On a GPU an operation may only order streams, so that a rank that has died would be noticed nowhere, and the
        first number that the host reads would hang: `wait` polls, and raises LostRankError after `comm.timeout`.
        """
        if device.type != "cuda":
            return Work.done(None)
        event = torch.cuda.Event()
        event.record()
        return Work(lambda: wait_until(event.query, self._timeout, self.rank, "the other ranks"))

    @abstractmethod
    def _split(self, color: int, key: int) -> Communicator: ...

    def split(self, color: int, key: int) -> Communicator:
        """A communicator of the ranks that passed the same `color`, ordered by `key`, then by rank. Collective.

        It is closed with this one, if not before.
        """
        group = self._split(color, key)
        self._groups.append(group)
        return group

    @abstractmethod
    def abort(self, reason: str) -> NoReturn:
        """Ends the whole job at once, with a non-zero exit status on every rank.

        Prints `reason` to stderr, unless it is empty.
        """

    def regroup_(self, revokes: bool = True) -> None:
        """Leaves out the ranks that have died; the others keep their order. For each of these, after a DeadRankError.

        Operations under way end by that error, and groups that were split off are gone. `revokes` False: operations of
        other ranks end as they do, where none waits for a dead one. Raises it again if another rank dies meanwhile;
        LostRankError if one neither answers nor dies; LeftOutError if this one is to end.
        """
        if revokes:
            self.revoke()
        while self._groups:
            self._groups.pop()._abandon()
        self._regroup()
        self._locate()
        for follow in self.after_regroup:
            follow()

    def revoke(self) -> None:
        """Ends what is under way here and in groups by DeadRankError on every rank."""
        for group in self._groups:
            group.revoke()
        self._revoke()

    def close(self) -> None:
        """Closes the groups that were split off, the last one first, then this one. Collective.

        All ranks have split in one order, so each group is closed by its ranks at the same place. No operation may
        follow; a second call does nothing.
        """
        if self._is_closed:
            return
        self._is_closed = True
        while self._groups:
            self._groups.pop().close()
        self._close()

    # ---- shared by all engines

    def _locate(self) -> None:
        """Finds out which ranks share a node, by host name. Collective; engines call it last in `__init__`."""
        self.hosts = self.all_gather_object(socket.gethostname())
        own = self.hosts[self.rank]
        nodes = list(dict.fromkeys(self.hosts))
        self.local_rank = self.hosts[: self.rank].count(own)
        self.local_size = self.hosts.count(own)
        self.node_rank = nodes.index(own)
        self.node_count = len(nodes)

    def _reducible(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        """`tensor` as the engine can reduce it: itself where possible, else a flat, wider or host copy."""
        flat = self._reachable(tensor.detach()).contiguous().view(-1)
        return flat if self._can_reduce(flat.dtype, op) else flat.to(_WIDER[flat.dtype])

    def _as_bytes(self, tensor: Tensor) -> Tensor:
        return self._reachable(tensor.detach()).contiguous().view(-1).view(torch.uint8)

    def _reachable(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda or self.supports("cuda"):
            return tensor
        _warn_once(f"engine {self.engine} cannot reach GPU memory: tensors are staged through pinned host memory")
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is not one of the {self.size} ranks of this communicator")

    def _check_parts(self, part: Tensor, values: Tensor) -> None:
        _check_dtype(values)
        are_flat = part.dim() == values.dim() == 1 and part.is_contiguous() and values.is_contiguous()
        if not are_flat or part.dtype != values.dtype or len(values) != self.size * len(part):
            raise ValueError(
                f"a part {tuple(part.shape)} {part.dtype} of values {tuple(values.shape)} {values.dtype}: both must be "
                f"1-D, contiguous and of one dtype, the values {self.size} times as long as the part of one rank"
            )

    def _check_point_to_point(self, tensor: Tensor, peer: int) -> None:
        _check_dtype(tensor)
        self._check_rank(peer)
        if peer == self.rank:
            raise ValueError(f"rank {peer} cannot exchange messages with itself")


def _check_dtype(tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in DTYPES))
        raise TypeError(f"{tensor.dtype} is not communicated; convert it to one of {names}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
