"""Engine `torch`: torch.distributed, NCCL on GPUs and Gloo on CPUs, for those who cannot build Horovod.

It needs no launcher of its own: ranks find each other through MPI under mpirun, through Slurm's environment
under srun, through Horovod under horovodrun, and through MASTER_ADDR where somebody has set it (rendezvous.py).
"""

from __future__ import annotations

import gc
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, distributed_c10d  # type: ignore[attr-defined]  # it fills itself in at run time

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import ENGINE_TIMEOUT, end_process, lost_rank_errors, wait_until
from hvdlm.comm.gloo_waits import GlooWaits
from hvdlm.comm.gpus import shared_gpus, visible_gpus
from hvdlm.comm.groups import group_by_color, group_ranks
from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.work import Work

_OPS = {ReduceOp.SUM: dist.ReduceOp.SUM, ReduceOp.MAX: dist.ReduceOp.MAX}

_WATCHDOG_MARGIN = timedelta(seconds=60)

# torch 2.13 renamed it, and warns at each call by the old name.
_all_gather_equal = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_equal = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_gloo_waits = GlooWaits()


class TorchCommunicator(Communicator):
    """Ranks of a process group of torch.distributed."""

    engine = "torch"

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int], timeout: float) -> None:
        """`members`: the global ranks of `group`, in our order; `timeout`: seconds of every wait. `start` makes the
        first one."""
        super().__init__()
        self._group, self._timeout = group, timeout
        self._is_gloo = "nccl" not in dist.get_backend_config(group)
        if self._is_gloo:  # now that its ranks are connected, our own timeout counts (failure.py)
            group.set_timeout(timedelta(seconds=ENGINE_TIMEOUT))
        self._members = list(members)
        self._group_ranks = group_ranks(members)
        self._is_in_group_order = self._group_ranks == list(range(len(members)))
        gpu = {"cuda"} if "nccl" in dist.get_backend_config(group) else set()
        if gpu:
            # NCCL's own watchdog ends the process without a sentence: it is to come second, after `arrival`
            backend = group._get_backend(torch.device("cuda"))
            backend._set_default_timeout(timedelta(seconds=timeout) + _WATCHDOG_MARGIN)
        self.capabilities = frozenset({"send", "split", "float16", "bfloat16"} | gpu)
        self.rank, self.size = self._members.index(dist.get_rank()), len(self._members)
        self._locate()

    @classmethod
    def start(cls, store: Store, rank: int, size: int, timeout: float) -> TorchCommunicator:
        """Joins the ranks that share `store`; `timeout`: seconds of every operation."""
        limit = timedelta(seconds=timeout)
        backend = "cpu:gloo,cuda:nccl" if _one_gpu_a_rank(store, rank, size) else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        group = dist.group.WORLD
        assert group is not None
        return cls(group, range(size), timeout)

    def _split(self, color: int, key: int) -> Communicator:
        everyone = self.all_gather_object((color, key, uuid.uuid4().hex))
        ranks = group_by_color([each[:2] for each in everyone])[color]
        members = [self._members[rank] for rank in ranks]
        with _named_group(everyone[ranks[0]][2]):
            limit = timedelta(seconds=self._timeout)
            group = dist.new_group(sorted(members), timeout=limit, use_local_synchronization=True)
        return TorchCommunicator(group, members, self._timeout)

    def abort(self, reason: str) -> NoReturn:
        end_process(reason)  # the launcher ends the other ranks when one exits non-zero

    def _close(self) -> None:
        is_whole_job = self._group is dist.group.WORLD
        if is_whole_job:
            dist.destroy_process_group()  # and its groups: one that ends earlier would leave its name to a later one
        del self._group  # otherwise its threads outlive the interpreter and abort the process
        if is_whole_job:
            gc.collect()  # operations that have ended still reference the connections

    def _can_reduce(self, dtype: torch.dtype, op: ReduceOp) -> bool:
        return True

    def _all_reduce(self, flat: Tensor, op: ReduceOp) -> Work[None]:
        return self._start(dist.all_reduce, flat, _OPS[op], async_op=True)

    def _reduce_scatter(self, part: Tensor, values: Tensor, op: ReduceOp) -> Work[None]:
        if values.is_cuda and self._is_in_group_order:
            return self._start(_reduce_scatter_equal, part, values, _OPS[op], async_op=True)
        # Gloo's own takes as many bytes and as long as its all-reduce (PyTorch 2.13); this takes half of both
        rows = self._all_to_all(values.split(len(part)), [len(part)] * self.size)

        def reduce(rows: list[Tensor]) -> None:
            joined = torch.stack(rows)
            torch.sum(joined, 0, out=part) if op is ReduceOp.SUM else torch.amax(joined, 0, out=part)

        return rows.then(reduce)

    def _all_gather(self, data: Tensor, lengths: Sequence[int]) -> Work[Tensor]:
        # Both backends gather equal parts only: shorter ones are padded to the longest.
        longest = max(lengths)
        padded = data if data.numel() == longest else torch.cat([data, data.new_zeros(longest - data.numel())])
        rows = data.new_empty(self.size * longest)  # in the group's order of ranks

        def in_rank_order() -> Tensor:
            return torch.cat(
                [rows[each * longest :][:length] for each, length in zip(self._group_ranks, lengths, strict=True)]
            )

        work = self._start(_all_gather_equal, rows, padded, async_op=True)
        return work.then(lambda _: in_rank_order())

    def _all_gather_into(self, values: Tensor, part: Tensor) -> Work[None]:
        if not self._is_in_group_order:
            return super()._all_gather_into(values, part)
        return self._start(_all_gather_equal, values, part, async_op=True)

    def _all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> Work[list[Tensor]]:
        by_group_rank = [self._group_ranks.index(each) for each in range(self.size)]
        sent = torch.cat([parts[each] for each in by_group_rank])
        output = sent.new_empty(sum(lengths))
        sizes = [lengths[each] for each in by_group_rank], [len(parts[each]) for each in by_group_rank]

        def in_rank_order() -> list[Tensor]:
            arrived = output.split(sizes[0])
            return [arrived[each] for each in self._group_ranks]

        # Of NCCL one grouped operation: sends and receives of several pairs one by one may wait for each other
        work = self._start(dist.all_to_all_single, output, sent, *sizes, async_op=True)
        return work.then(lambda _: in_rank_order())

    def _broadcast(self, data: Tensor, root: int) -> Work[None]:
        return self._start(dist.broadcast, data, self._members[root], async_op=True)

    def _send(self, data: Tensor, destination: int) -> Work[None]:
        return self._start(dist.isend, data, self._members[destination], peer=f"rank {destination} to receive")

    def _receive(self, data: Tensor, source: int) -> Work[None]:
        return self._start(dist.irecv, data, self._members[source], peer=f"rank {source} to send")

    def _start(
        self, operation: Callable[..., dist.Work | None], *arguments: Any, peer: str | None = None, **options: Any
    ) -> Work[None]:
        """`peer`: what a message between two ranks waits for; None: the operation is a collective."""
        with lost_rank_errors(self.engine, self.rank, RuntimeError):
            work = operation(*arguments, group=self._group, **options)
        assert work is not None  # torch returns none only to ranks outside the group

        def finish() -> None:
            with lost_rank_errors(self.engine, self.rank, RuntimeError):
                if self._is_gloo and peer is not None:  # Gloo does not tell whether a message has arrived
                    _gloo_waits.wait_for(work, self._timeout, self.rank, peer)
                    return
                if self._is_gloo:
                    wait_until(work.is_completed, self._timeout, self.rank, "the other ranks")
                work.wait()

        return Work(finish)


@contextmanager
def _named_group(name: str) -> Iterator[None]:
    """Within it a new group has this name, which all of its ranks must give it.

    torch.distributed names a group of some ranks by them and by how many groups the process has: ranks that have made
    unlike numbers of groups would wait for each other under different names, and a name returns after a group is closed
    (torch 2.13, distributed_c10d.py).
    """
    original = distributed_c10d._hash_ranks_to_str
    distributed_c10d._hash_ranks_to_str = lambda ranks: name
    try:
        yield
    finally:
        distributed_c10d._hash_ranks_to_str = original


def _one_gpu_a_rank(store: Any, rank: int, size: int) -> bool:
    """Whether each rank computes on a GPU of its own, as NCCL wants it; the same answer on all ranks."""
    store.set(f"hvdlm/{rank}", json.dumps(visible_gpus() if dist.is_nccl_available() else []))
    visible = [json.loads(store.get(f"hvdlm/{each}")) for each in range(size)]
    return all(visible) and not shared_gpus(visible)
