"""Engine `torch`: torch.distributed, NCCL on GPUs and Gloo on CPUs, for those who cannot build Horovod.

It needs no launcher of its own: ranks find each other through MPI under mpirun, through Slurm's environment
under srun, through Horovod under horovodrun, and through MASTER_ADDR where somebody has set it (rendezvous.py).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]  # it fills itself in at run time

from hvdlm.comm.communicator import Communicator, ReduceOp, Work
from hvdlm.comm.failure import lost_rank_errors
from hvdlm.comm.gpus import shared_gpus, visible_gpus
from hvdlm.comm.groups import group_by_color, group_ranks

_OPS = {ReduceOp.SUM: dist.ReduceOp.SUM, ReduceOp.MAX: dist.ReduceOp.MAX}

_WATCHDOG_MARGIN = timedelta(seconds=60)

# torch 2.13 renamed it, and warns at each call by the old name.
_all_gather_equal = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TorchCommunicator(Communicator):
    """Ranks of a process group of torch.distributed."""

    engine = "torch"

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int], limit: timedelta) -> None:
        """`members`: the global ranks of `group`, in our order; `limit`: of every wait. `start` makes the first one."""
        super().__init__()
        self._group, self._limit = group, limit
        self._timeout = limit.total_seconds()
        self._members = list(members)
        self._group_ranks = group_ranks(members)
        gpu = {"cuda"} if "nccl" in dist.get_backend_config(group) else set()
        if gpu:
            # NCCL's own watchdog ends the process without a sentence: it is to come second, after `arrival`
            backend = group._get_backend(torch.device("cuda"))
            backend._set_default_timeout(limit + _WATCHDOG_MARGIN)
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
        return cls(group, range(size), limit)

    def _split(self, color: int, key: int) -> Communicator:
        ranks = group_by_color(self.all_gather_object((color, key)))[color]
        members = [self._members[rank] for rank in ranks]
        group = dist.new_group(sorted(members), timeout=self._limit, use_local_synchronization=True)
        return TorchCommunicator(group, members, self._limit)

    def abort(self, reason: str) -> NoReturn:
        print(reason, file=sys.stderr, flush=True)
        os._exit(1)  # the launcher ends the other ranks when one exits non-zero

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

    def _reduce_scatter(self, flat: Tensor, op: ReduceOp, lengths: Sequence[int]) -> Work[Tensor]:
        # Gloo cannot scatter, NCCL only equal parts: the whole is reduced, and one part of it kept.
        reduced = flat.clone()
        return self._all_reduce(reduced, op).then(lambda _: torch.split(reduced, list(lengths))[self.rank].clone())

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
        return self._start(dist.isend, data, self._members[destination])

    def _receive(self, data: Tensor, source: int) -> Work[None]:
        return self._start(dist.irecv, data, self._members[source])

    def _start(self, operation: Callable[..., dist.Work | None], *arguments: Any, **options: Any) -> Work[None]:
        with lost_rank_errors(self.engine, self.rank, RuntimeError):
            work = operation(*arguments, group=self._group, **options)
        assert work is not None  # torch returns none only to ranks outside the group

        def finish() -> None:
            with lost_rank_errors(self.engine, self.rank, RuntimeError):
                work.wait()

        return Work(finish)


def _one_gpu_a_rank(store: Any, rank: int, size: int) -> bool:
    """Whether each rank computes on a GPU of its own, as NCCL wants it; the same answer on all ranks."""
    store.set(f"hvdlm/{rank}", json.dumps(visible_gpus() if dist.is_nccl_available() else []))
    visible = [json.loads(store.get(f"hvdlm/{each}")) for each in range(size)]
    return all(visible) and not shared_gpus(visible)
