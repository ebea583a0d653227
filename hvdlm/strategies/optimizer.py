"""The optimizer that every rank steps by: AdamW, Adam, SGD, Lion or Muon. Matrices decay, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvdlm.comm.communicator import Communicator
from hvdlm.config import OptimizerSection
from hvdlm.strategies.adam_and_sgd import SGD, Adam
from hvdlm.strategies.frozen_variance_adamw import FrozenVarianceAdamW
from hvdlm.strategies.held_parts import STEP
from hvdlm.strategies.hidden_matrices import hidden_matrices, is_hidden_matrix
from hvdlm.strategies.lion import Lion
from hvdlm.strategies.muon.optimizer import MOMENTUM, MuonAdamW
from hvdlm.strategies.muon.slices import SlicedMatrices, SlicedMuonAdamW

# Of the state of a parameter: what has the parameter's shape, and who counts steps
_MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "dion": ("exp_avg", "exp_avg_sq"),
    "muon": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "lion": ("momentum",),
    "sgd": ("momentum_buffer",),
}
_COUNT_STEPS = ("adamw", "dion", "muon", "adam")


def make_optimizer(model: nn.Module, settings: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer of `settings.algorithm` over the parameters of `model`, with all of its state.

    Embeddings and weights of linear layers decay; biases and normalisation weights, which have one dimension, do not.
    The decay is decoupled (Loshchilov & Hutter, ICLR 2019) for AdamW, Lion and Muon, and a part of the gradient, which
    is L2 regularisation, for Adam (Kingma & Ba, ICLR 2015, algorithm 1) and SGD. With algorithm "dion", AdamW over
    those that Dion does not step (dion/strategy.py).
    """
    matrices = hidden_matrices(model) if settings.algorithm in ("dion", "muon") else {}
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and name not in matrices]
    decaying, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    return make_optimizer_of(decaying, others, settings, list(matrices.values()))


def make_optimizer_of(
    decaying: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter],
    settings: OptimizerSection,
    matrices: Sequence[nn.Parameter] | SlicedMatrices = (),
) -> torch.optim.Optimizer:
    """The same over parameters, or parts of them, that decay and that do not, of which there may be none.

    `matrices`: which Muon steps; where ranks own slices of them, `step` is collective.
    """
    groups = [
        {"params": list(decaying), "weight_decay": settings.weight_decay},
        {"params": list(others), "weight_decay": 0.0},
    ]
    optimizer = _make([group for group in groups if group["params"]] or groups[:1], matrices, settings)
    for parameter in (*decaying, *others):
        # What the optimizer would make at its first step: made now, so that every rank can be sent the state to resume.
        state: dict[str, Tensor] = {name: torch.zeros_like(parameter) for name in _moment_names(settings)}
        if settings.algorithm in _COUNT_STEPS:
            state[STEP] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = state
    return optimizer


def _moment_names(settings: OptimizerSection) -> tuple[str, ...]:
    """What is kept of each parameter, in its shape."""
    return () if settings.algorithm == "sgd" and not settings.momentum else _MOMENTS[settings.algorithm]


def state_kinds(settings: OptimizerSection, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, ...]]:
    """What is kept of each parameter of a model, by its name and shape: its moments, and `STEP` where steps are
    counted; of a matrix that Muon steps, its momentum.
    """
    usual = (*_moment_names(settings), *([STEP] if settings.algorithm in _COUNT_STEPS else []))
    has_muon = settings.algorithm == "muon"
    return {
        name: (MOMENTUM,) if has_muon and is_hidden_matrix(name, shape) else usual for name, shape in shapes.items()
    }


def _make(
    groups: list[dict[str, Any]], matrices: Sequence[nn.Parameter] | SlicedMatrices, settings: OptimizerSection
) -> torch.optim.Optimizer:
    betas = (settings.beta1, settings.beta2)
    if settings.algorithm == "sgd":
        return SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov, fused=True)
    if settings.algorithm == "lion":
        return Lion(groups, settings.lr, betas)
    if settings.algorithm == "adam":
        return Adam(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
    adamw: dict[str, Any] = {"lr": settings.lr, "betas": betas, "eps": settings.eps, "fused": True}
    adamw["freeze_variance_after"] = settings.freeze_variance_after
    if isinstance(matrices, SlicedMatrices):
        return SlicedMuonAdamW(groups, matrices, settings, **adamw)
    if settings.algorithm == "muon":
        return MuonAdamW(groups, matrices, settings, **adamw)
    return FrozenVarianceAdamW(groups, **adamw)


def leave_out_if(optimizer: torch.optim.Optimizer, found: Tensor) -> bool:
    """Lets the next step change nothing if `found`, a boolean scalar on the parameters' device, is true: a fused kernel
    reads it. Returns False where another kernel will step.
    """
    other_kernels = isinstance(optimizer, MuonAdamW) or getattr(optimizer, "freezes_variance", False)
    if not optimizer.defaults.get("fused") or other_kernels:
        return False
    optimizer.found_inf = found.float()  # type: ignore[attr-defined]  # PyTorch's scaler of gradients tells it so
    return True


def deal_out_among(optimizer: torch.optim.Optimizer, communicator: Communicator | None) -> None:
    """From now on `communicator`'s ranks, whose gradients are equal, divide the work of a step; None: none do."""
    if isinstance(optimizer, MuonAdamW):
        optimizer.deal_out_among(communicator)


def sent_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What this rank has sent in its last step for that."""
    return optimizer.sent_bytes if isinstance(optimizer, MuonAdamW) else 0


def clip_factor(norm: float, most: float) -> float:
    """By what gradients of this norm are multiplied, for it to be `most` at most; 0: any norm will do."""
    return most / norm if 0 < most < norm else 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by name, `exp_avg.blocks.0...`: the tensors themselves, to save, fill or broadcast."""
    return named_state(optimizer, dict(model.named_parameters()))


def named_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for parameters by name."""
    names = {parameter: name for name, parameter in parameters.items()}
    return {
        f"{kind}.{names[parameter]}": tensor
        for parameter, state in optimizer.state.items()
        for kind, tensor in state.items()
    }
