"""AdamW as language models use it: decoupled decay on matrices only, one fused kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hvdlm.config import OptimizerSection

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, settings: OptimizerSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019, algorithm 2) over the parameters of `model`.

    Embeddings and weights of linear layers decay; biases and normalisation weights, which have one dimension, do not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
    for parameter in parameters:
        # What AdamW itself would make at its first step: made now, so that every rank can be sent the state to resume.
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{name: torch.zeros_like(parameter) for name in _MOMENTS},
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by name, `exp_avg.blocks.0...`: the tensors themselves, to save, fill or broadcast."""
    names: Mapping[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{kind}.{names[parameter]}": tensor
        for parameter, state in optimizer.state.items()
        for kind, tensor in state.items()
    }
