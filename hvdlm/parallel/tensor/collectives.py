"""Sums over tensor ranks within the forward and the backward pass.

The all-reduce is an operator that torch.compile knows by name, so that a block is compiled as a whole.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator

# By a number, since operators take tensors and numbers only
_communicators: WeakValueDictionary[int, Communicator] = WeakValueDictionary()
_numbers = itertools.count()


class TensorRanks:
    """The ranks that divide a model's matrices among them, in the order of their parts.

    Each of them computes the same, but for its own parts: so all call the same methods in the same order.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.rank, self.size = communicator.rank, communicator.size
        self._number = next(_numbers)
        _communicators[self._number] = communicator

    def enter(self, x: Tensor) -> Tensor:
        """`x`, equal on all ranks, for layers that are divided: its gradient is the sum of all ranks' (f in section 3
        of the Megatron-LM paper).
        """
        entered: Tensor = _Enter.apply(x, self._number)  # type: ignore[no-untyped-call]
        return entered

    def leave(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, whose gradient is the sum's (g in that section)."""
        summed: Tensor = _Leave.apply(x, self._number)  # type: ignore[no-untyped-call]
        return summed

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, (size, *shape), without gradients; in the one message of a sum."""
        everyone = x.new_zeros(self.size, *x.shape)
        everyone[self.rank] = x
        return self.communicator.all_reduce_(everyone)


@torch.library.custom_op("hvdlm::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, number: int) -> Tensor:
    """The sum of `x` over the ranks of a communicator."""
    return _communicators[number].all_reduce_(x.clone(memory_format=torch.contiguous_format))


@_all_reduce.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        ctx.number = number
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed: Tensor = _all_reduce(grad, ctx.number)
        return summed, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        summed: Tensor = _all_reduce(x, number)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
