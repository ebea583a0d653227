"""Layers whose parameters get no gradients in a backward pass: what these are made of is kept, by sequence.

A layer is given extra inputs, `marks`, that change nothing in the forward pass. The backward pass gives for them what
gradients are made of, also where blocks are compiled or computed again (Bu et al., arXiv:2210.00038, call it
book-keeping: it saves the second backward pass that others make with clipped losses).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdlm.model.linear import Linear
from hvdlm.privacy import sequence_norms

Gradient = tuple[Tensor, Tensor]  # a parameter and its gradient, of its shape and dtype


class RecordedLayer(ABC):
    """A layer with `marks`, which are leaves of autograd's graph."""

    marks: tuple[Tensor, ...] | None = None  # of the pass under way; None: the layer is an ordinary one

    @abstractmethod
    def begin(self, sequences: int, length: int) -> None:
        """Makes marks for a forward pass of sequences of `length` tokens."""

    def end(self) -> None:
        """Makes it an ordinary layer."""
        self.marks = None

    @abstractmethod
    def squared_norms(self, grads: Sequence[Tensor]) -> Tensor:
        """(b,) float32: of each sequence's gradient of the layer's parameters. grads: of the marks."""

    @abstractmethod
    def gradients(self, grads: Sequence[Tensor], factors: Tensor) -> Iterator[Gradient]:
        """The sum over sequences of their gradients, multiplied by their factors, (b,) float32: of the last parameter
        first.
        """


class RecordedLinear(Linear, RecordedLayer):
    """`Linear`; the gradients of its marks are its input, (b, T, I), and the gradient of its output, (b, T, O)."""

    def begin(self, sequences: int, length: int) -> None:
        dtype, device = self.compute_dtype, self.weight.device
        self.marks = (
            _mark((sequences, length, self.in_features), dtype, device),
            _mark((sequences, length, self.out_features), dtype, device),
        )

    def _product(self, x: Tensor, bias: Tensor | None, low_precision_bias: Tensor | None) -> Tensor:
        if self.marks is None:
            return super()._product(x, bias, low_precision_bias)
        weight = self.low_precision_weight
        if weight is None:
            weight, low_precision_bias = self.weight.detach(), None if bias is None else bias.detach()
        product: Tensor = _Product.apply(x.to(weight.dtype), weight, low_precision_bias, *self.marks)  # type: ignore[no-untyped-call]
        return product

    def squared_norms(self, grads: Sequence[Tensor]) -> Tensor:
        squares = sequence_norms.of_matrix(*grads)
        return squares if self.bias is None else squares + sequence_norms.of_rows(grads[1])

    def gradients(self, grads: Sequence[Tensor], factors: Tensor) -> Iterator[Gradient]:
        inputs, outputs = grads
        if self.bias is not None:
            yield self.bias, factors @ outputs.sum(dim=1, dtype=torch.float32)
        yield self.weight, weighted_product(outputs, inputs, factors)


class _Product(torch.autograd.Function):
    """x W^T + b, whose gradients of the marks are the input and the gradient of the output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, input_mark: Tensor, output_mark: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return grad @ weight, None, None, x, grad


class RecordedNorm(RecordedLayer):
    """A norm whose marks are the parameters themselves, once for each sequence: (b, 1, D)."""

    weight: nn.Parameter

    def begin(self, sequences: int, length: int) -> None:
        own = self._parameters_in_order()
        self.marks = tuple(each.detach().expand(sequences, 1, -1).requires_grad_() for each in own)

    def squared_norms(self, grads: Sequence[Tensor]) -> Tensor:
        return torch.stack([each.float().square().sum(dim=(1, 2)) for each in grads]).sum(dim=0)

    def gradients(self, grads: Sequence[Tensor], factors: Tensor) -> Iterator[Gradient]:
        for parameter, grad in reversed(list(zip(self._parameters_in_order(), grads, strict=True))):
            yield parameter, factors @ grad.squeeze(1)

    def _parameters_in_order(self) -> list[nn.Parameter]:
        bias = getattr(self, "bias", None)
        return [self.weight] if bias is None else [self.weight, bias]


class RecordedLayerNorm(nn.LayerNorm, RecordedNorm):
    """`nn.LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.marks is None:
            return super().forward(x)
        y = functional.layer_norm(x, self.normalized_shape, None, None, self.eps) * self.marks[0]
        return y + self.marks[1] if len(self.marks) == 2 else y


class RecordedRMSNorm(nn.RMSNorm, RecordedNorm):
    """`nn.RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.marks is None:
            return super().forward(x)
        return functional.rms_norm(x, self.normalized_shape, None, self.eps) * self.marks[0]


def weighted_product(grads: Tensor, inputs: Tensor, factors: Tensor) -> Tensor:
    """(O, I) float32: the sum over sequences and tokens of g_t x_t^T, each sequence with its factor.

    grads: (b, T, O). inputs: (b, T, I). factors: (b,) float32.
    """
    scales = factors[:, None, None]
    if inputs.shape[-1] < grads.shape[-1]:  # the smaller one is copied
        inputs = (inputs * scales).to(inputs.dtype)
    else:
        grads = (grads * scales).to(grads.dtype)
    return (grads.flatten(0, 1).T @ inputs.flatten(0, 1)).float()


def _mark(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A leaf that takes no memory: its gradient has the shape of its own."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()
