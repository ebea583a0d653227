"""What an engine provides: `Primitives`, from which `Communicator` makes all the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from hvdlm.comm.work import Work
from hvdlm.errors import HvdlmError


class ReduceOp(Enum):
    """The reduction over ranks."""

    SUM = "sum"
    MAX = "max"


class Primitives(ABC):
    """Operations on tensors that are contiguous and 1-D, with at least one element on some rank."""

    engine: str
    rank: int
    size: int

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _can_reduce(self, dtype: torch.dtype, op: ReduceOp) -> bool: ...

    @abstractmethod
    def _all_reduce(self, flat: Tensor, op: ReduceOp) -> Work[None]: ...

    @abstractmethod
    def _reduce_scatter(self, part: Tensor, values: Tensor, op: ReduceOp) -> Work[None]:
        """Equal parts. `values` stay as they are, unless `part` is this rank's part of them."""

    @abstractmethod
    def _all_gather(self, data: Tensor, lengths: Sequence[int]) -> Work[Tensor]: ...

    def _all_gather_into(self, values: Tensor, part: Tensor) -> Work[None]:
        """Equal parts, as bytes."""

        def keep(gathered: Tensor) -> None:
            values.copy_(gathered)

        return self._all_gather(part, [len(part)] * self.size).then(keep)

    @abstractmethod
    def _all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> Work[list[Tensor]]:
        """`parts[r]` is sent to rank r; `lengths[r]` bytes come from it. All may be empty on all ranks."""

    @abstractmethod
    def _broadcast(self, data: Tensor, root: int) -> Work[None]: ...

    def _send(self, data: Tensor, destination: int) -> Work[None]:
        raise HvdlmError(f"engine {self.engine} has no send; use engine mpi or torch")

    def _receive(self, data: Tensor, source: int) -> Work[None]:
        raise HvdlmError(f"engine {self.engine} has no receive; use engine mpi or torch")

    def _revoke(self) -> None:
        raise HvdlmError(f"engine {self.engine} cannot leave out ranks that have died")

    def _regroup(self) -> None: ...  # noqa: B027

    def _abandon(self) -> None:  # noqa: B027
        """Closes this group without its ranks, once its operations have ended. Not collective."""
