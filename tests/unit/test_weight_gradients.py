"""Gradients of weights that are made after those of inputs, against autograd's own."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hvdlm.model.linear import Linear, WeightGradients


def layers_of(dtype: torch.dtype, later: bool) -> list[Linear]:
    torch.manual_seed(1)
    layers = [Linear(5, 7, bias=True), Linear(7, 3, bias=False)]
    for layer in layers:
        layer.set_compute_dtype(dtype)
        layer.leaves_out_weight_gradients = later
    return layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputes", [False, True])
def test_they_are_those_of_autograd(dtype: torch.dtype, recomputes: bool) -> None:
    """Bit for bit, of two passes that are under way at once, whose gradients are made in another order."""
    expected, ours = layers_of(dtype, later=False), layers_of(dtype, later=True)
    inputs = [torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]

    def run(layers: list[Linear], x: torch.Tensor) -> torch.Tensor:
        def both(x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = layers[1](torch.tanh(layers[0](x)))
            return made

        made: torch.Tensor = checkpoint(both, x, use_reentrant=False) if recomputes else both(x)
        return made.float().pow(2).sum()

    input_grads = []
    for x in inputs:
        x.requires_grad_()
        run(expected, x).backward()
        input_grads.append(x.grad)
        x.grad = None
    calls: list[str] = []
    for layer in ours:
        layer.weight.register_post_accumulate_grad_hook(lambda weight: calls.append(str(tuple(weight.shape))))
    losses = [run(ours, x) for x in inputs]
    later = []
    for loss in losses:
        later.append(WeightGradients())
        with later[-1].left_out():
            loss.backward()
    assert all(torch.equal(x.grad, grad) for x, grad in zip(inputs, input_grads, strict=True))
    assert all(layer.weight.grad is None for layer in ours)
    assert torch.equal(ours[0].bias.grad, expected[0].bias.grad)
    assert calls == []  # no hook sees a gradient that is not there
    for each in later:
        each.make()
    assert calls == ["(3, 7)", "(7, 5)"] * 2
    for layer, other in zip(ours, expected, strict=True):
        assert torch.equal(layer.weight.grad, other.weight.grad)
    later[0].make()  # there are none left
    assert torch.equal(ours[0].weight.grad, expected[0].weight.grad)


def test_a_backward_pass_does_not_lose_them() -> None:
    loss = layers_of(torch.float32, later=True)[0](torch.randn(2, 5)).sum()
    with pytest.raises(RuntimeError, match="nothing notes them"):
        loss.backward()
