"""A number that a GPU computes, for a host that does not wait for it in the step."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import wait_until


class LateNumber:
    """A copy of a scalar on a GPU, which is on its way to the host while both go on."""

    def __init__(self, value: Tensor) -> None:
        """`value`: a scalar on a GPU, of the current stream."""
        self._copy = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
        self._is_there = torch.cuda.Event()
        self._is_there.record()

    def read(self, communicator: Communicator, timeout: float) -> float:
        """The number. Raises LostRankError if it is not there within `timeout` seconds: it depends on other ranks."""
        wait_until(self._is_there.query, timeout, communicator.rank, "the gradients of the other ranks")
        return float(self._copy)
