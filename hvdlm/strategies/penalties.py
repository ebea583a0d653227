"""L1 and L2 regularisation: gradients of penalties on weights are added to those of the loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hvdlm.config import OptimizerSection


@torch.no_grad()
def add_penalties_(parameters: Iterable[Tensor], settings: OptimizerSection) -> None:
    """Adds to `.grad` that of `l1` |w| + `l2` w^2 / 2, of matrices, as decay is: of what has one dimension nothing."""
    matrices = [each for each in parameters if each.dim() >= 2 and each.grad is not None]
    gradients = [each.grad for each in matrices if each.grad is not None]
    if settings.l1 and matrices:
        torch._foreach_add_(gradients, torch._foreach_sign(matrices), alpha=settings.l1)
    if settings.l2 and matrices:
        torch._foreach_add_(gradients, matrices, alpha=settings.l2)
