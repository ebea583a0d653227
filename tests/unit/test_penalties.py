"""L1 and L2 regularisation against autograd of the penalties."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvdlm.config import OptimizerSection
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.strategies.penalties import add_penalties_


@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2), (0.0, 0.0)])
def test_gradients_are_those_of_the_penalised_loss(l1: float, l2: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    loss = model(x).square().mean()
    expected = torch.autograd.grad(
        loss + l1 * model.weight.abs().sum() + l2 / 2 * model.weight.square().sum(), list(model.parameters())
    )
    model(x).square().mean().backward()
    add_penalties_([each for each in model.parameters() if each.dim() >= 2], OptimizerSection(l1=l1, l2=l2))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("setting", ["l1", "l2"])
def test_not_with_dion(setting: str) -> None:
    """No rank has the gradients of its matrices."""
    with pytest.raises(HvdlmError, match=f"optimizer.{setting} is added to gradients"):
        load(None, ["--optimizer.algorithm", "dion", f"--optimizer.{setting}", "1e-4"], PRESETS)
