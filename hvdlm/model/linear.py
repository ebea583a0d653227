"""A linear layer that computes in 16 bits with weights that stay in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


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
        if self.low_precision_weight is None:
            return functional.linear(x, self.weight, bias)
        x = x.to(self.low_precision_weight.dtype)
        product: Tensor = _Product.apply(x, self.weight, bias, self.low_precision_weight, low_precision_bias)  # type: ignore[no-untyped-call]
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
        bias_grad = rows.sum(dim=0).float() if ctx.has_bias else None  # added in fp32, then rounded, on its own
        return grad @ low_precision_weight, weight_grad.float(), bias_grad, None, None
