"""Updates on a CPU: the bits of one rounding an operation, by NumPy, in any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hvdlm.strategies import update_loops
from hvdlm.strategies.adam_and_sgd import SGD, Adam
from hvdlm.strategies.frozen_variance_adamw import FrozenVarianceAdamW
from hvdlm.strategies.update_loops import adam_, add_scaled_, lion_, move_, sgd_

LENGTH = 200_001  # enough for three threads, and no multiple of a vector
SHAPE = (3, LENGTH // 3)


@pytest.fixture(params=[1, 3], autouse=True)
def _threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def numbers(seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32))


def parameter() -> Tensor:
    own = numbers(1).requires_grad_()
    own.grad = numbers(2)
    return own


def f(value: float) -> np.float32:
    return np.float32(value)


def test_sums_and_averages() -> None:
    target, values = numbers(3), numbers(4)
    expected = target.numpy() + values.numpy() * f(0.3)
    add_scaled_(target, values, 0.3)
    assert np.array_equal(target.numpy(), expected)
    expected = target.numpy() + (values.numpy() - target.numpy()) * f(0.2)
    move_(target, values, 0.2)
    assert np.array_equal(target.numpy(), expected)
    expected = values.numpy() - (values.numpy() - target.numpy()) * f(1 - 0.7)
    move_(target, values, 0.7)
    assert np.array_equal(target.numpy(), expected)


def test_values_may_be_of_another_type_and_layout() -> None:
    target, values = torch.ones(2, 3), torch.arange(6.0).to(torch.bfloat16).view(3, 2).t()
    add_scaled_(target, values, 2.0)
    assert target.tolist() == [[1, 5, 9], [3, 7, 11]]


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam(decoupled: bool) -> None:
    own, m, v = parameter(), numbers(3), numbers(4).square()
    state = {"step": torch.tensor(4.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    group = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    w, g, m, v = (each.detach().numpy().copy() for each in (own, own.grad, m, v))
    if not decoupled:
        g = g + w * f(0.1)
    m = m + (g - m) * f(1 - 0.9)
    v = v * f(0.99) + g * g * f(1 - 0.99)
    kept = w * f(1 - 0.01 * 0.1) if decoupled else w
    w = kept - m * f(0.01 / (1 - 0.9**5)) / (np.sqrt(v) / f((1 - 0.99**5) ** 0.5) + f(1e-8))
    adam_(own, state, group, decoupled)
    assert state["step"] == 5
    for mine, expected in ((own, w), (state["exp_avg"], m), (state["exp_avg_sq"], v)):
        assert np.array_equal(mine.detach().numpy(), expected)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd(nesterov: bool) -> None:
    own, momentum = parameter(), numbers(3)
    group = {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.9, "nesterov": nesterov}
    w, g, m = (each.detach().numpy().copy() for each in (own, own.grad, momentum))
    g = g + w * f(0.01)
    m = m * f(0.9) + g
    w = w - (g + m * f(0.9) if nesterov else m) * f(0.1)
    sgd_(own, {"momentum_buffer": momentum}, group)
    assert np.array_equal(own.detach().numpy(), w) and np.array_equal(momentum.numpy(), m)


def test_lion() -> None:
    own, momentum = parameter(), numbers(3)
    w, g, m = (each.detach().numpy().copy() for each in (own, own.grad, momentum))
    w = w * f(1 - 0.01 * 0.3) - np.sign(m + (g - m) * f(1 - 0.9)) * f(0.01)
    m = m + (g - m) * f(1 - 0.99)
    lion_(own, momentum, {"lr": 0.01, "weight_decay": 0.3, "betas": (0.9, 0.99)})
    assert np.array_equal(own.detach().numpy(), w) and np.array_equal(momentum.numpy(), m)


def test_a_parameter_without_a_gradient_stays() -> None:
    own = numbers(1)
    state = {"step": torch.tensor(0.0)}
    adam_(own, state, {}, decoupled=True)
    sgd_(own, {}, {})
    lion_(own, own, {})
    assert torch.equal(own, numbers(1)) and state["step"] == 0


def test_short_loops_have_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_loops, "_threads", lambda count: pytest.fail(f"{count} threads"))
    move_(torch.zeros(1000), torch.ones(1000), 0.5)


@pytest.mark.parametrize(
    ("ours", "plain", "settings"),
    [
        (FrozenVarianceAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
        (Adam, torch.optim.Adam, {"weight_decay": 0.1}),
        (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (SGD, torch.optim.SGD, {}),
    ],
)
def test_optimizers_that_nobody_has_prepared(
    ours: type[torch.optim.Optimizer], plain: type[torch.optim.Optimizer], settings: dict[str, object]
) -> None:
    """Others make them anew of a parameter alone, as Horovod's does: they step as PyTorch's."""
    pair = [parameter(), parameter()]
    optimizers = [kind([own], lr=0.01, **settings) for kind, own in zip((ours, plain), pair, strict=True)]  # type: ignore[call-arg]
    for seed in (5, 6, 7):
        for own, optimizer in zip(pair, optimizers, strict=True):
            own.grad = numbers(seed)
            optimizer.step()
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-5, atol=1e-6)
