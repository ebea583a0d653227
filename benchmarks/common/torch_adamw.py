"""The optimizer of other systems: PyTorch's AdamW, whatever hvdlm steps by."""

from __future__ import annotations

import torch
from torch import nn

from hvdlm.config import OptimizerSection
from hvdlm.errors import HvdlmError


def torch_adamw(model: nn.Module, settings: OptimizerSection) -> torch.optim.AdamW:
    """Over the parameters of `model`; those of two dimensions decay. Raises HvdlmError for another optimizer."""
    if settings.algorithm != "adamw":
        raise HvdlmError(
            f"other systems train by PyTorch's AdamW, not by {settings.algorithm}: leave out optimizer.algorithm, or "
            "name no --peers"
        )
    decaying = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.lr, betas=betas, eps=settings.eps, fused=True
    )
