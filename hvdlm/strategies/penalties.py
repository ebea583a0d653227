"""L1 and L2 regularisation: gradients of penalties on weights are added to those of the loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hvdlm.config import OptimizerSection
from hvdlm.strategies.update_loops import add_scaled_


@torch.no_grad()
def add_penalties_(matrices: Iterable[Tensor], settings: OptimizerSection) -> None:
    """Adds to `.grad` that of `l1` |w| + `l2` w^2 / 2: of matrices, or parts of them, as decay is."""
    for each in matrices if settings.l1 or settings.l2 else ():
        if each.grad is not None:
            add_scaled_(each.grad, each, settings.l2)
            if settings.l1:
                add_scaled_(each.grad, each.sign(), settings.l1)
