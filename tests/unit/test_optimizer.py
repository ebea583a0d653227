"""Optimizers against their formulas, written out in float64; and the state that checkpoints and broadcasts name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from hvdlm.config import ModelSection, OptimizerSection
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.optimizer import make_optimizer, optimizer_tensors, set_learning_rate

SETTINGS = OptimizerSection(lr=0.02, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)

Array = npt.NDArray[np.float64]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = nn.Parameter(torch.randn(3, 5, generator=generator))
        self.vector = nn.Parameter(torch.randn(7, generator=generator))


def adamw(start: Array, gradients: list[Array], rates: list[float], decay: float) -> Array:
    """Loshchilov & Hutter, algorithm 2: the decay is multiplied by the rate alone, not by the moments."""
    value, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        corrected_first, corrected_second = first / (1 - 0.8**t), second / (1 - 0.9**t)
        value = value - rate * decay * value - rate * corrected_first / (np.sqrt(corrected_second) + 1e-6)
    return value


def adam(start: Array, gradients: list[Array], rates: list[float], decay: float) -> Array:
    """Kingma & Ba, algorithm 1; L2 regularisation is a part of the gradient."""
    value, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        whole = gradient + decay * value
        first, second = 0.8 * first + 0.2 * whole, 0.9 * second + 0.1 * whole**2
        value = value - rate * (first / (1 - 0.8**t)) / (np.sqrt(second / (1 - 0.9**t)) + 1e-6)
    return value


def sgd(start: Array, gradients: list[Array], rates: list[float], decay: float, nesterov: bool = False) -> Array:
    """Sutskever et al., ICML 2013, as PyTorch has it: the rate multiplies the whole momentum."""
    value, momentum = start.copy(), np.zeros_like(start)
    for gradient, rate in zip(gradients, rates, strict=True):
        whole = gradient + decay * value
        momentum = 0.7 * momentum + whole
        value = value - rate * (whole + 0.7 * momentum if nesterov else momentum)
    return value


def plain_sgd(start: Array, gradients: list[Array], rates: list[float], decay: float) -> Array:
    value = start.copy()
    for gradient, rate in zip(gradients, rates, strict=True):
        value = value - rate * (gradient + decay * value)
    return value


def lion(start: Array, gradients: list[Array], rates: list[float], decay: float) -> Array:
    """Chen et al., arXiv:2302.06675, algorithm 2."""
    value, momentum = start.copy(), np.zeros_like(start)
    for gradient, rate in zip(gradients, rates, strict=True):
        value = value - rate * (np.sign(0.8 * momentum + 0.2 * gradient) + decay * value)
        momentum = 0.9 * momentum + 0.1 * gradient
    return value


FORMULAS: dict[str, tuple[Callable[..., Array], dict[str, Any]]] = {
    "adamw": (adamw, {}),
    "adam": (adam, {"algorithm": "adam"}),
    "sgd": (sgd, {"algorithm": "sgd", "momentum": 0.7}),
    "nesterov": (partial(sgd, nesterov=True), {"algorithm": "sgd", "momentum": 0.7, "nesterov": True}),
    "plain sgd": (plain_sgd, {"algorithm": "sgd", "momentum": 0.0}),
    "lion": (lion, {"algorithm": "lion"}),
}


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("uses_loops", [True, False])
def test_steps_are_the_formula_s_and_only_matrices_decay(
    uses_loops: bool, kind: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvdlm.strategies.update_loops.uses_loops", lambda _: uses_loops)  # not on a GPU
    monkeypatch.setattr("hvdlm.strategies.lion.uses_loops", lambda _: uses_loops)
    formula, settings = FORMULAS[kind]
    model = Model()
    optimizer = make_optimizer(model, SETTINGS.model_copy(update=settings))
    starts = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    gradients: dict[str, list[Array]] = {name: [] for name in starts}
    rates = [0.02 / (1 + step) for step in range(steps)]
    generator = torch.Generator().manual_seed(2)
    for rate in rates:
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            gradients[name].append(parameter.grad.double().numpy().copy())
        set_learning_rate(optimizer, rate)
        optimizer.step()
    for name, parameter in model.named_parameters():
        expected = formula(starts[name], gradients[name], rates, decay=0.3 if name == "matrix" else 0.0)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=2e-6, atol=2e-7)


def test_a_first_step_moves_by_the_rate() -> None:
    # The bias corrections cancel the betas: m / sqrt(v) = sign(gradient) at step 1.
    model = Model()
    optimizer = make_optimizer(model, OptimizerSection(lr=0.5, weight_decay=0.0, eps=1e-12))
    before = model.vector.detach().clone()
    model.matrix.grad = torch.zeros_like(model.matrix)
    model.vector.grad = torch.tensor([1e-3, -1e-3, 5.0, -5.0, 1.0, -1.0, 0.0])
    optimizer.step()
    moved = (model.vector.detach() - before).tolist()
    assert moved == pytest.approx([-0.5, 0.5, -0.5, 0.5, -0.5, 0.5, 0.0], abs=1e-6)


def test_a_parameter_with_a_zero_gradient_still_decays() -> None:
    model = Model()
    optimizer = make_optimizer(model, OptimizerSection(lr=0.5, weight_decay=0.1))
    before = model.matrix.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.matrix.detach(), before * 0.95)


def test_embeddings_and_linear_weights_decay_and_nothing_else() -> None:
    model = Transformer(ModelSection(layers=2, width=16, heads=2, context_length=8), vocab_size=11)
    optimizer = make_optimizer(model, SETTINGS)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[parameter] for parameter in group["params"]} for group in optimizer.param_groups
    }
    assert groups.keys() == {0.3, 0.0}
    assert groups[0.0] == {name for name in names.values() if name.endswith(".bias") or "norm" in name}
    assert groups[0.3] | groups[0.0] == set(names.values())
    assert {"token_embedding.weight", "position_embedding.weight", "blocks.1.mlp.down.weight"} <= groups[0.3]


def test_one_fused_kernel_with_the_settings_given() -> None:
    for group in make_optimizer(Model(), SETTINGS).param_groups:
        assert group["fused"] is True
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.9), 1e-6)
        assert group["amsgrad"] is False


def test_frozen_parameters_have_no_state() -> None:
    model = Model()
    model.vector.requires_grad_(False)
    optimizer = make_optimizer(model, SETTINGS)
    assert {name.split(".", 1)[1] for name in optimizer_tensors(optimizer, model)} == {"matrix"}
    assert len(optimizer.param_groups) == 1


def test_the_state_has_names_and_is_there_before_the_first_step() -> None:
    model = Model()
    tensors = optimizer_tensors(make_optimizer(model, SETTINGS), model)
    assert tensors.keys() == {
        f"{kind}.{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in ("matrix", "vector")
    }
    assert tensors["exp_avg_sq.matrix"].shape == (3, 5)
    assert tensors["step.vector"].shape == ()
    assert all(tensor.dtype == torch.float32 and not tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("kind", FORMULAS)
def test_the_named_tensors_are_the_optimizer_s_own(kind: str) -> None:
    """Filling them resumes: a run of 3 steps and 2 more after a move to a new model is a run of 5, bit for bit."""

    def train(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    settings = SETTINGS.model_copy(update=FORMULAS[kind][1])
    whole = Model()
    train(whole, make_optimizer(whole, settings), range(5))

    first = Model()
    first_optimizer = make_optimizer(first, settings)
    train(first, first_optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(first_optimizer, first).items()}
    assert saved.get("step.matrix", 3) == 3

    second = Model()
    second.load_state_dict(first.state_dict())
    second_optimizer = make_optimizer(second, settings)
    for name, tensor in optimizer_tensors(second_optimizer, second).items():
        tensor.copy_(saved[name])
    train(second, second_optimizer, range(3, 5))
    assert torch.equal(second.matrix, whole.matrix)
    assert torch.equal(second.vector, whole.vector)


@pytest.mark.parametrize("uses_loops", [True, False])
def test_frozen_second_moments(uses_loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of AdamW, then two by the formula, in float64, with the second moment of the third."""
    monkeypatch.setattr("hvdlm.strategies.update_loops.uses_loops", lambda _: uses_loops)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    settings = OptimizerSection(lr=0.1, freeze_variance_after=3)
    optimizer = make_optimizer(model, settings)
    gradients = [torch.randn(2, 3) for _ in range(5)]
    weight = model.weight.detach().double().clone()
    first, second = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for step, gradient in enumerate(gradients, start=1):
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros(2)
        optimizer.step()
        first = settings.beta1 * first + (1 - settings.beta1) * gradient.double()
        if step <= 3:
            second = settings.beta2 * second + (1 - settings.beta2) * gradient.double() ** 2
        unbiased = first / (1 - settings.beta1**step), second / (1 - settings.beta2 ** min(step, 3))
        weight = weight * (1 - 0.1 * settings.weight_decay) - 0.1 * unbiased[0] / (unbiased[1].sqrt() + settings.eps)
        assert torch.allclose(model.weight.double(), weight, rtol=1e-5, atol=1e-7)
    assert optimizer.state[model.weight]["step"] == 5


def test_frozen_steps_hold_no_copy_of_all_second_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four matrices of 4 KB each, two at once where 8 KB are allowed."""
    monkeypatch.setattr("hvdlm.strategies.frozen_variance_adamw._RUN_BYTES", 8192)
    monkeypatch.setattr("hvdlm.strategies.update_loops.uses_loops", lambda _: False)  # as on a GPU
    model = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))
    optimizer = make_optimizer(model, OptimizerSection(lr=0.1, freeze_variance_after=1))
    lengths = []
    root = torch._foreach_sqrt

    def count(tensors: list[Tensor]) -> Any:
        lengths.append(sum(tensor.nbytes for tensor in tensors))
        return root(tensors)

    monkeypatch.setattr(torch, "_foreach_sqrt", count)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert lengths == [8192, 8192]
