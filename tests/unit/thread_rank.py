"""Several ranks as threads of one process, for tests of what ranks tell each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from hvdlm.comm.activity import Activity
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.comm.work import Work

T = TypeVar("T")


class ThreadRank(SoloCommunicator):
    """One rank of several that are threads of this process; they exchange objects, and few kinds of tensors."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.slots, self.exchange = rank, len(slots), slots, barrier
        self.hosts = [f"n{rank}" for rank in range(self.size)]
        self.activity = Activity()

    def all_gather_object(self, value: Any) -> list[Any]:
        self.slots[self.rank] = value
        self.exchange.wait()
        everyone = list(self.slots)
        self.exchange.wait()
        return everyone

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        return self.all_gather_object(value)[root]

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp = ReduceOp.SUM) -> torch.Tensor:
        everyone = torch.stack(self.all_gather_object(tensor.clone()))
        return tensor.copy_(everyone.amax(0) if op is ReduceOp.MAX else everyone.sum(0))

    def broadcast_async_(self, tensor: torch.Tensor, root: int = 0) -> Work[torch.Tensor]:
        tensor.copy_(self.broadcast_object(tensor.clone(), root))
        return Work(lambda: tensor)


def on_threads(size: int, body: Callable[[Communicator], T]) -> list[T]:
    """What `body` returns on each of `size` ranks; a rank that waits a minute for another fails."""
    slots: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(body, [ThreadRank(rank, slots, barrier) for rank in range(size)]))
