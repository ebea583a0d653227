"""Cross-entropy from hidden states, without ever holding the logits of all tokens.

With a vocabulary of 50,000 the logits of a batch outweigh everything else in memory.
The loss needs them one token at a time, so tokens are taken in chunks; and because its
gradient with respect to the logits (softmax minus one-hot) is known as soon as they are,
each chunk's share of the gradients is computed with the loss and nothing is recomputed
in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvdlm.targets import IGNORE

_CACHED = 2**18  # numbers; 1 MiB in fp32


class TokenStatistics(NamedTuple):
    """Sums over the targets that count; scalars on the device of the hidden states, so nothing waits for it."""

    loss_sum: Tensor  # fp32, nats
    correct_count: Tensor  # int64: targets to which the model gives the highest probability
    target_count: Tensor  # int64


class Softmax:
    """Over a vocabulary whose logits are all here; what divides it among ranks derives from this."""

    def losses(self, logits: Tensor, targets: Tensor, precise: torch.dtype) -> tuple[Tensor, Tensor]:
        """-log softmax(logits)[target], (n,) in `precise`, and whether the target is the likeliest token, (n,) bool.

        logits: (n, V). targets: (n,) int64.
        """
        losses = torch.empty(len(logits), dtype=precise, device=logits.device)
        for part in cached_rows(logits):
            _, losses[part] = _log_probabilities_and_losses(logits[part], targets[part], precise)
        return losses, logits.argmax(dim=-1) == targets

    def differentiate_(self, logits: Tensor, targets: Tensor, precise: torch.dtype, scale: float) -> Tensor:
        """The same losses; replaces the logits by `scale` times their gradient, softmax - one-hot."""
        losses = torch.empty(len(logits), dtype=precise, device=logits.device)
        for part in cached_rows(logits):
            log_probabilities, losses[part] = _log_probabilities_and_losses(logits[part], targets[part], precise)
            probabilities = log_probabilities.exp_()
            ones = probabilities.new_full((len(probabilities), 1), -1.0)
            gradient = probabilities.scatter_add_(1, targets[part, None], ones)
            logits[part] = gradient if scale == 1 else gradient.mul_(scale)
        return losses


def _log_probabilities_and_losses(logits: Tensor, targets: Tensor, precise: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n, V) and (n,) in `precise`, of logits (n, V) and targets (n,)."""
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=precise)
    return log_probabilities, -log_probabilities.gather(1, targets[:, None]).squeeze(1)


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
    grad_scale: float = 1.0,
    softmax: Softmax | None = None,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats.

    hidden: (..., D). weight: (V, D). targets: (...) int64, of which those equal to `IGNORE` do not count.
    dtype: of matrix products; None: the weight's. chunk_tokens: how many tokens are taken at once; None chooses by
    memory. grad_scale: by what the gradient of the logits is multiplied before it is rounded to `dtype`, and what
    results divided again: about what the backward pass begins with, where that is a loss scale (Micikevicius et al.,
    ICLR 2018, section 3.2). In fp16 a probability below 6e-8 would vanish otherwise, and an overflow in the products
    could not be mended by a smaller loss scale. softmax: None, unless `weight` has some rows of a vocabulary only.

    Logarithms, sums and the accumulated gradient of the weight are in fp32. Returns an fp32 scalar (fp64 for fp64
    weights). Differentiable once with respect to hidden and weight; one backward pass only, because it overwrites what
    it saved.
    """
    dtype = dtype or weight.dtype
    chunk_tokens = chunk_tokens or loss_chunk_tokens(weight.shape[0], dtype.itemsize, hidden.device.type)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        rows = hidden.reshape(-1, hidden.shape[-1])
        arguments = (dtype, chunk_tokens, grad_scale, softmax or Softmax())
        loss: Tensor = _TokenLoss.apply(rows, weight, targets.reshape(-1), *arguments)  # type: ignore[no-untyped-call]
        return loss
    return token_statistics(hidden, weight, targets, dtype, chunk_tokens, softmax).loss_sum


@torch.no_grad()
def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
    softmax: Softmax | None = None,
) -> TokenStatistics:
    """Loss and next-token accuracy in one pass, without gradients. Arguments as of `token_loss`."""
    softmax = softmax or Softmax()
    dtype = dtype or weight.dtype
    matrix = weight.to(dtype)
    losses = torch.zeros(targets.numel(), dtype=_precise(weight), device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    rows = hidden.reshape(-1, hidden.shape[-1])
    chunk_tokens = chunk_tokens or loss_chunk_tokens(weight.shape[0], dtype.itemsize, hidden.device.type)
    for chunk in _chunks(rows, targets.reshape(-1), dtype, chunk_tokens):
        logits = chunk.hidden @ matrix.T  # (n, V)
        own, is_likeliest = softmax.losses(logits, chunk.targets, losses.dtype)
        losses[chunk.tokens] = own.masked_fill_(chunk.ignored, 0)
        correct += (is_likeliest & ~chunk.ignored).sum()
        del logits  # before the next are made
    return TokenStatistics(losses.sum(), correct, (targets != IGNORE).sum())


def loss_chunk_tokens(vocab_size: int, item: int, device: str = "cpu") -> int:
    """How many tokens' logits, of `item` bytes a number, the loss holds at once: 128 MiB on a "cpu", 512 MiB on a
    "cuda" device, within bounds.

    Each chunk also adds to the (V, D) gradient of the output weight, whose traffic is what small chunks pay:
    on 2 cores, 384 wide, 50,304 words, time was level from 256 tokens on and 1.7 times as much at 64. A GPU computes
    so much faster than it reads memory that it takes chunks four times as large. The upper bound keeps sums over a
    chunk within the range of fp16.
    """
    logits = (128 if device == "cpu" else 512) * 2**20
    return min(max(logits // (item * vocab_size), 256), 4096)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        chunk_tokens: int,
        grad_scale: float,
        softmax: Softmax,
    ) -> Tensor:
        precise = _precise(weight)
        matrix = weight.to(dtype)
        losses = torch.zeros(targets.numel(), dtype=precise, device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=precise) if needs_weight else None
        for chunk in _chunks(hidden, targets, dtype, chunk_tokens):
            # d loss / d logits. Ignored tokens are left out of the products that follow, whose rows have D numbers, and
            # not here, where they have V.
            logits_grad = chunk.hidden @ matrix.T  # (n, V)
            own = softmax.differentiate_(logits_grad, chunk.targets, precise, grad_scale)
            losses[chunk.tokens] = own.masked_fill_(chunk.ignored, 0)
            if hidden_grad is not None:
                product = (logits_grad @ matrix).masked_fill_(chunk.ignored[:, None], 0)
                hidden_grad[chunk.tokens] = product.to(hidden_grad.dtype)
            if weight_grad is not None:
                counted = chunk.hidden.masked_fill(chunk.ignored[:, None], 0)
                if dtype == precise:
                    weight_grad.addmm_(logits_grad.T, counted)
                else:
                    weight_grad += logits_grad.T @ counted
            del logits_grad  # before the next are made
        ctx.grad_scale = grad_scale
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because a second (V, D) would be the largest tensor of the step. PyTorch's own check of
        # saved tensors refuses a second backward pass, which would find them scaled already.
        factor = loss_grad / ctx.grad_scale
        hidden_grad, weight_grad = (None if grad is None else grad.mul_(factor) for grad in ctx.saved_tensors)
        return hidden_grad, weight_grad, None, None, None, None, None


class _Chunk(NamedTuple):
    tokens: slice  # which n of all tokens
    hidden: Tensor  # (n, D), in the dtype of the products
    targets: Tensor  # (n,); 0 for ignored ones, which is a valid index
    ignored: Tensor  # (n,) bool


def _chunks(hidden: Tensor, targets: Tensor, dtype: torch.dtype, chunk_tokens: int) -> Iterator[_Chunk]:
    for start in range(0, len(targets), chunk_tokens):
        tokens = slice(start, start + chunk_tokens)
        ignored = targets[tokens] == IGNORE
        yield _Chunk(tokens, hidden[tokens].to(dtype), targets[tokens].masked_fill(ignored, 0), ignored)


def cached_rows(logits: Tensor) -> Iterator[slice]:
    """Parts of the rows of (n, V) logits.

    On a CPU few rows at once: what follows then finds them in the cache, which with 50,000 words made it three times
    as fast.
    """
    rows = max(1, _CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


def _precise(weight: Tensor) -> torch.dtype:
    """Of logarithms and sums."""
    return torch.promote_types(weight.dtype, torch.float32)
