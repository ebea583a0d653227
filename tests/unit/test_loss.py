"""token_loss against torch.nn.functional.cross_entropy, in value, gradient, memory and precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvdlm.model.loss import IGNORE, token_loss, token_statistics


def make(tokens: int, width: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.3
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::5] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), targets


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_by_hand():
    """Logits (0, ln 3) and (ln 4, 0): the targets have probabilities 3/4 and 1/5."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    hidden = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0], [5.0, 5.0]], requires_grad=True)
    loss = token_loss(hidden, weight, torch.tensor([1, 1, IGNORE]))
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(5))
    loss.backward()
    # softmax minus one-hot, times the unit matrix
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.25, -0.25], [0.8, -0.8], [0.0, 0.0]]))
    # sum over tokens of (softmax - one-hot)^T hidden
    expected = torch.tensor([[0.8 * math.log(4), 0.25 * math.log(3)], [-0.8 * math.log(4), -0.25 * math.log(3)]])
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, 64, 100, 1000])
def test_equals_cross_entropy(chunk_tokens):
    hidden, weight, targets = make(100, 16, 211)
    expected = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORE)
    expected_gradients = torch.autograd.grad(0.37 * expected, (hidden, weight))
    loss = token_loss(hidden, weight, targets, chunk_tokens=chunk_tokens)
    gradients = torch.autograd.grad(0.37 * loss, (hidden, weight))
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


def test_batch_shape_and_strided_hidden():
    hidden, weight, targets = make(60, 16, 50)
    flat = token_loss(hidden, weight, targets)
    (expected,) = torch.autograd.grad(flat, hidden)
    strided = hidden.detach().view(4, 15, 16).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    loss = token_loss(strided, weight, targets.view(4, 15), chunk_tokens=16)
    loss.backward()
    torch.testing.assert_close(loss, flat)
    torch.testing.assert_close(strided.grad, expected.view(4, 15, 16))


def test_gradient_equals_central_differences():
    hidden, weight, targets = make(9, 4, 11)
    inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    gradients = torch.autograd.grad(token_loss(*inputs, targets, chunk_tokens=4), inputs)
    step = 1e-6
    for tensor, gradient in zip(inputs, gradients, strict=True):
        numbers = tensor.detach().view(-1)  # shares the memory of the input
        for index, value in enumerate(numbers.tolist()):
            losses = []
            for shifted in (value + step, value - step):
                numbers[index] = shifted
                losses.append(token_loss(*inputs, targets, chunk_tokens=4).item())
            numbers[index] = value
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient.view(-1)[index].item(), abs=1e-7)


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_gradient_of_one_alone(needed):
    hidden, weight, targets = make(20, 8, 30)
    wanted = torch.autograd.grad(token_loss(hidden, weight, targets), (hidden, weight))
    ours = [tensor.detach().requires_grad_(need) for tensor, need in zip((hidden, weight), needed, strict=True)]
    token_loss(*ours, targets).backward()
    for tensor, gradient, need in zip(ours, wanted, needed, strict=True):
        assert torch.equal(tensor.grad, gradient) if need else tensor.grad is None


def test_all_ignored_is_zero_and_not_nan():
    hidden, weight, targets = make(10, 8, 30)
    loss = token_loss(hidden, weight, torch.full_like(targets, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    loss = token_loss(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 2000
    assert torch.equal(hidden.grad, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("chunk_tokens", [32, None], ids=["explicit", "default"])
def test_never_holds_all_logits(chunk_tokens):
    """By default 256 tokens of so large a vocabulary are taken at once."""
    tokens, width, vocabulary = 257, 4, 140_000
    hidden, weight, targets = make(tokens, width, vocabulary)
    with LargestTensor() as largest:
        token_loss(hidden, weight, targets, chunk_tokens=chunk_tokens).backward()
    assert largest.elements == (chunk_tokens or 256) * vocabulary
    with LargestTensor() as largest, torch.no_grad():
        token_loss(hidden, weight, targets, chunk_tokens=chunk_tokens)
    assert largest.elements == (chunk_tokens or 256) * vocabulary


def test_evaluation_computes_no_gradient():
    hidden, weight, targets = make(64, 8, 40)

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.count += "mm" in operation.__name__
            return operation(*args, **(kwargs or {}))

    with torch.no_grad(), Products() as products:
        loss = token_loss(hidden, weight, targets)
    assert products.count == 1
    assert not loss.requires_grad
    with Products() as products:
        token_loss(hidden, weight, targets)
    assert products.count == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_tokens", [13, None])
def test_with_products_in_16_bits(dtype, chunk_tokens):
    """As exact as rounding hidden states and weight to the dtype beforehand allows: 8 or 11 bits."""
    hidden, weight, targets = make(100, 32, 300)
    rounded = [tensor.detach().to(dtype).double().requires_grad_() for tensor in (hidden, weight)]
    expected = functional.cross_entropy(rounded[0] @ rounded[1].T, targets, reduction="sum")
    wanted = torch.autograd.grad(expected, rounded)
    loss = token_loss(hidden, weight, targets, dtype, chunk_tokens)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    epsilon = torch.finfo(dtype).eps
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=epsilon)
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - exact).norm() < epsilon * exact.norm()


def test_fp16_loss_scaling_keeps_gradients_finite():
    """The scale multiplies fp32 gradients after the fp16 products, so it cannot overflow them."""
    hidden, weight, targets = make(100, 32, 300)
    loss = token_loss(hidden, weight, targets, torch.float16)
    plain = torch.autograd.grad(loss, (hidden, weight))
    loss = token_loss(hidden, weight, targets, torch.float16)
    scaled = torch.autograd.grad(loss * 2.0**24, (hidden, weight))
    for one, other in zip(plain, scaled, strict=True):
        assert torch.equal(one * 2.0**24, other)
        assert other.abs().max() > torch.finfo(torch.float16).max


def test_second_backward_is_refused():
    hidden, weight, targets = make(10, 8, 30)
    loss = token_loss(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_weight_gets_both_gradients():
    """The embedding looks tokens up in the same matrix that makes the logits."""
    _, weight, targets = make(40, 8, 30)
    tokens = targets.clamp(min=0)
    functional.cross_entropy(weight[tokens] @ weight.T, targets, reduction="sum").backward()
    expected = weight.grad.clone()
    weight.grad = None
    token_loss(weight[tokens], weight, targets, chunk_tokens=7).backward()
    torch.testing.assert_close(weight.grad, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_statistics(chunk_tokens):
    hidden, weight, targets = make(100, 16, 20)
    with torch.no_grad():
        logits = hidden @ weight.T
        best = logits.argmax(dim=-1)
        targets[1:50:5] = best[1:50:5]  # else there is hardly a correct one
        expected = functional.cross_entropy(logits, targets, reduction="sum")
    statistics = token_statistics(hidden, weight, targets, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(statistics.loss_sum, expected)
    assert statistics.correct_count.item() == sum(int(b) == int(t) for b, t in zip(best, targets, strict=True)) >= 10
    assert statistics.target_count.item() == 80
    assert not statistics.loss_sum.requires_grad


def test_a_target_outside_the_vocabulary_is_an_error():
    hidden, weight, targets = make(10, 8, 30)
    targets[3] = 30
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_loss(hidden, weight, targets)


def test_small_probabilities_of_fp16_are_scaled_before_they_are_rounded():
    """A token of probability e^-18 = 1.5e-8, below the least number of fp16, 6e-8."""
    weight = torch.tensor([[18.0], [0.0]], requires_grad=True)
    hidden = torch.ones(1, 1, requires_grad=True)
    scale = 2.0**12
    for grad_scale, expected in ((1.0, 0.0), (scale, math.exp(-18))):
        weight.grad = None
        loss = token_loss(hidden, weight, torch.tensor([0]), torch.float16, grad_scale=grad_scale)
        (loss * scale).backward()
        assert weight.grad[1].item() / scale == pytest.approx(expected, rel=0.01)


def test_a_smaller_scale_mends_an_overflow_of_fp16():
    """1,024 tokens, whose hidden numbers of 500 each sum to 512,000: fp16 ends at 65,504."""
    weight = torch.zeros(2, 1, requires_grad=True)
    hidden = torch.full((1024, 1), 500.0, requires_grad=True)
    targets = torch.zeros(1024, dtype=torch.int64)
    for grad_scale, is_finite in ((1.0, False), (2.0**-5, True)):
        weight.grad = None
        (token_loss(hidden, weight, targets, torch.float16, grad_scale=grad_scale) * grad_scale).backward()
        assert bool(torch.isfinite(weight.grad).all()) == is_finite
    # (1/2 - 1) for the target, 1/2 for the other
    torch.testing.assert_close(weight.grad, 2.0**-5 * torch.tensor([[-256_000.0], [256_000.0]]))


@pytest.mark.parametrize("grad_scale", [2.0**-9, 0.25, 2.0**14])
def test_a_scale_changes_nothing_in_fp32(grad_scale):
    hidden, weight, targets = make(100, 16, 211)
    plain, scaled = (
        torch.autograd.grad(0.37 * token_loss(hidden, weight, targets, grad_scale=each), (hidden, weight))
        for each in (1.0, grad_scale)
    )
    assert all(torch.equal(one, other) for one, other in zip(plain, scaled, strict=True))
