"""Engine `solo`: one process. Every operation is at most a copy, and has ended when it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import end_process
from hvdlm.comm.primitives import ReduceOp
from hvdlm.comm.work import Work


class SoloCommunicator(Communicator):
    """One rank."""

    engine = "solo"
    capabilities = frozenset({"float16", "bfloat16", "split", "cuda"})

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size = 0, 1
        self._locate()

    def _split(self, color: int, key: int) -> Communicator:
        return SoloCommunicator()

    def abort(self, reason: str) -> NoReturn:
        end_process(reason)

    def _close(self) -> None:
        """Nothing was opened."""

    def _can_reduce(self, dtype: torch.dtype, op: ReduceOp) -> bool:
        return True

    def _all_reduce(self, flat: Tensor, op: ReduceOp) -> Work[None]:
        return Work.done(None)

    def _reduce_scatter(self, part: Tensor, values: Tensor, op: ReduceOp) -> Work[None]:
        part.copy_(values)
        return Work.done(None)

    def _all_gather(self, data: Tensor, lengths: Sequence[int]) -> Work[Tensor]:
        return Work.done(data.clone())

    def _all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> Work[list[Tensor]]:
        return Work.done([parts[0].clone()])

    def _broadcast(self, data: Tensor, root: int) -> Work[None]:
        return Work.done(None)
