"""A linear layer that computes in 16 bits with weights that stay in fp32, and may make their gradients later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class WeightGradients:
    """The gradients of weights that a backward pass has left out, to be made later (Qi et al. 2024, arXiv:2401.10241,
    section 2).

        with gradients.left_out():
            loss.backward()  # through layers with `leaves_out_weight_gradients`
        gradients.make()
    """

    # The passes of one process come one after the other, but on a GPU autograd runs them in a thread of its own
    current: ClassVar[WeightGradients | None] = None

    def __init__(self) -> None:
        self._products: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, rows of the gradient (n, O) and input (n, I)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within it, they are noted here and not made."""
        WeightGradients.current = self
        try:
            yield
        finally:
            WeightGradients.current = None

    def add(self, weight: Tensor, grad_rows: Tensor, rows: Tensor) -> None:
        self._products.append((weight, grad_rows, rows))

    def make(self) -> None:
        """Adds them to `.grad`, as autograd does: what it calls when it has, is called."""
        for weight, grad_rows, rows in self._products:
            torch.autograd.backward(weight, (grad_rows.T @ rows).to(weight.dtype))
        self._products.clear()


class Linear(nn.Linear):
    """x W^T + b, in the precision of its parameters, or by `set_compute_dtype` in a lower one.

    Then the parameters are fp32 master weights (Micikevicius et al., "Mixed Precision Training", ICLR 2018, section
    3.1) and products use low-precision copies. `update_low_precision_weights` makes the copies once an optimizer step,
    where autocast casts the weights at every use. Gradients of the parameters are fp32.
    """

    casts_bias = True  # whether a bias is added in the precision of products

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.low_precision_weight: Tensor | None = None
        self.low_precision_bias: Tensor | None = None
        self.leaves_out_weight_gradients = False  # to `WeightGradients`; not where it is compiled

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Computes products in `dtype` from now on."""
        copied = dtype != self.weight.dtype
        self.low_precision_weight = self.weight.detach().to(dtype) if copied else None
        self.low_precision_bias = self.bias.detach().to(dtype) if copied and self.bias is not None else None

    @torch.no_grad()
    def update_low_precision_weights(self) -> None:
        """Copies the parameters to the low-precision weights; call it after every change of the parameters."""
        if self.low_precision_weight is not None:
            self.low_precision_weight.copy_(self.weight)
        if self.low_precision_bias is not None:
            self.low_precision_bias.copy_(self.bias)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the products."""
        return self.weight.dtype if self.low_precision_weight is None else self.low_precision_weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs) to (..., outputs) in the dtype of the products, to which x is cast if they have copies."""
        return self._product(x, self.bias, self.low_precision_bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """The same as `forward` without a bias."""
        return self._product(x, None, None)

    def _product(self, x: Tensor, bias: Tensor | None, low_precision_bias: Tensor | None) -> Tensor:
        weight = self.low_precision_weight
        if self.leaves_out_weight_gradients:
            x = x.to(self.weight.dtype if weight is None else weight.dtype)
            later: Tensor = _ProductWithoutWeightGradient.apply(x, bias, _Leaf(self.weight), weight, low_precision_bias)  # type: ignore[no-untyped-call]
            return later
        if weight is None:
            return functional.linear(x, self.weight, bias)
        product: Tensor = _Product.apply(x.to(weight.dtype), self.weight, bias, weight, low_precision_bias)  # type: ignore[no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    """The product with the copies, whose gradients are those of the masters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_precision_weight: Tensor,
        low_precision_bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, low_precision_weight)
        ctx.has_bias = bias is not None
        return functional.linear(x, low_precision_weight, low_precision_bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low_precision_weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (n, outputs)
        weight_grad = rows.T @ x.reshape(-1, x.shape[-1])  # (outputs, inputs)
        return grad @ low_precision_weight, weight_grad.float(), _bias_grad(ctx, rows), None, None


class _Leaf(NamedTuple):
    """A parameter that autograd does not see: it calls hooks also of one that gets no gradient."""

    parameter: Tensor


class _ProductWithoutWeightGradient(torch.autograd.Function):
    """The same, or the product with the masters themselves; `WeightGradients` makes the gradient of the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: _Leaf,
        low_precision_weight: Tensor | None,
        low_precision_bias: Tensor | None,
    ) -> Tensor:
        if low_precision_weight is None:
            low_precision_weight, low_precision_bias = weight.parameter.detach(), bias
        ctx.save_for_backward(x, low_precision_weight)
        ctx.has_bias, ctx.weight = bias is not None, weight
        return functional.linear(x, low_precision_weight, low_precision_bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low_precision_weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (n, outputs)
        if WeightGradients.current is None:
            raise RuntimeError("the backward pass leaves out gradients of weights, and nothing notes them")
        WeightGradients.current.add(ctx.weight.parameter, rows, x.reshape(-1, x.shape[-1]))
        return grad @ low_precision_weight, _bias_grad(ctx, rows), None, None, None


def _bias_grad(ctx: Any, rows: Tensor) -> Tensor | None:
    """rows: (n, outputs)."""
    return rows.sum(dim=0).float() if ctx.has_bias else None  # added in fp32, then rounded, on its own
