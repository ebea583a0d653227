"""Sums over tensor ranks within the forward and the backward pass.

They are operators that torch.compile knows by name, so that a block is compiled as a whole.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator

# By name, since operators take tensors, numbers and strings only; a number would be a variable of compiled code as soon
# as a process has a second one
_communicators: WeakValueDictionary[str, Communicator] = WeakValueDictionary()
_numbers = itertools.count()


class TensorRanks:
    """The ranks that divide a model's matrices among them, in the order of their parts.

    Each of them computes the same, but for its own parts: so all call the same methods in the same order.
    """

    def __init__(self, communicator: Communicator, divides_sequence: bool = False) -> None:
        """`divides_sequence`: between the layers that are divided each rank has the hidden states of T / n tokens
        (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198, section
        4.2.2), in the order of ranks; otherwise those of all T.
        """
        self.communicator, self.divides_sequence = communicator, divides_sequence
        self.rank, self.size = communicator.rank, communicator.size
        self._name = str(next(_numbers))
        _communicators[self._name] = communicator

    def enter(self, x: Tensor) -> Tensor:
        """(B, T, D) for layers that are divided: `x`, (B, T, D) and equal on all ranks, or the (B, T / n, D) of all
        ranks. Its gradient is the sum of all ranks' (f in section 3 of the Megatron-LM paper).
        """
        if self.divides_sequence:
            gathered: Tensor = _all_gather_sequence(x, self._name)
            return gathered
        return self._enter(x)

    def leave(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, (B, T, D), or this rank's (B, T / n, D) of it (g in that section)."""
        if self.divides_sequence:
            part: Tensor = _reduce_scatter_sequence(x, self._name)
            return part
        summed: Tensor = _Leave.apply(x, self._name)  # type: ignore[no-untyped-call]
        return summed

    def shared(self, parameter: Tensor) -> Tensor:
        """A parameter that all ranks have, to be applied to hidden states: where each has those of some tokens only,
        its gradient is the sum of all ranks'.
        """
        return self._enter(parameter) if self.divides_sequence else parameter

    def _enter(self, x: Tensor) -> Tensor:
        entered: Tensor = _Enter.apply(x, self._name)  # type: ignore[no-untyped-call]
        return entered

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, (size, *shape), without gradients; in the one message of a sum."""
        everyone = x.new_zeros(self.size, *x.shape)
        everyone[self.rank] = x
        return self.communicator.all_reduce_(everyone)


@torch.library.custom_op("hvdlm::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, name: str) -> Tensor:
    """The sum of `x` over the ranks of a communicator."""
    return _communicators[name].all_reduce_(x.clone(memory_format=torch.contiguous_format))


@_all_reduce.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("hvdlm::all_gather_sequence", mutates_args=())
def _all_gather_sequence(x: Tensor, name: str) -> Tensor:
    """(B, T / n, D) of all n ranks to (B, T, D)."""
    parts = _communicators[name].all_gather(x.contiguous())  # (n, B, T / n, D)
    return parts.transpose(0, 1).reshape(x.shape[0], _communicators[name].size * x.shape[1], x.shape[2])


@_all_gather_sequence.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return x.new_empty(x.shape[0], _communicators[name].size * x.shape[1], x.shape[2])


@torch.library.custom_op("hvdlm::reduce_scatter_sequence", mutates_args=())
def _reduce_scatter_sequence(x: Tensor, name: str) -> Tensor:
    """(B, T, D) to this rank's (B, T / n, D) of the sum over all n ranks."""
    parts = (
        x.reshape(x.shape[0], _communicators[name].size, -1, x.shape[2]).transpose(0, 1).contiguous()
    )  # (n, B, T / n, D)
    return _communicators[name].reduce_scatter(parts).view(parts.shape[1:])


@_reduce_scatter_sequence.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // _communicators[name].size, x.shape[2])


def _keep_name(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.name = inputs[1]


# Each is the other's gradient
_all_gather_sequence.register_autograd(
    lambda ctx, grad: (_reduce_scatter_sequence(grad, ctx.name), None), setup_context=_keep_name
)
_reduce_scatter_sequence.register_autograd(
    lambda ctx, grad: (_all_gather_sequence(grad, ctx.name), None), setup_context=_keep_name
)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed: Tensor = _all_reduce(grad, ctx.name)
        return summed, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        summed: Tensor = _all_reduce(x, name)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
