"""The loss of hidden states, and what the gradient of the output matrix is made of, by sequence.

As in hvdlm/model/loss.py logits are made for some sequences at once and turned into their gradients, whose products
with one another give the norms. They are kept for the gradient of the matrix where those of all sequences fit into what
that file allows, and otherwise made once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hvdlm.model.loss import Softmax, loss_chunk_tokens
from hvdlm.privacy import sequence_norms
from hvdlm.privacy.layers import weighted_product
from hvdlm.targets import IGNORE


class OutputLayer:
    """The loss of one pass over b sequences. Norms and gradients are of the sum of the loss over tokens, times 1."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, tokens: Tensor | None) -> None:
        """`weight`: (V, D). `dtype`: of products. `tokens`: what the model was given, (b, T), if the weight is that of
        the token embedding, too.
        """
        self._weight, self._dtype, self._tokens = weight.detach(), dtype, tokens
        self._softmax = Softmax()
        self.squared_norms = torch.empty(0)  # (b,) float32: of each sequence's gradient of the weight
        self._hidden = self._targets = torch.empty(0)
        self._logit_grads: list[Tensor] | None = []
        self._own_logit_grads = torch.empty(0)  # (b, T, T): of the gradients of logits, those of the tokens given

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum over targets that count, in nats. hidden: (b, T, D). targets: (b, T) int64."""
        loss: Tensor = _Loss.apply(hidden, targets, self)  # type: ignore[no-untyped-call]
        return loss

    def differentiate(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of tokens, (b, T), and the gradient of hidden states."""
        ignored = targets == IGNORE
        # Tokens that do not count are left out of all products by their inputs, which have D numbers, not V
        self._hidden = hidden.to(self._dtype).masked_fill(ignored[:, :, None], 0)
        self._targets = targets.masked_fill(ignored, 0)
        matrix = self._weight.to(self._dtype)
        parts, keeps = list(self._parts()), self._at_once() >= len(hidden)
        losses, hidden_grad, squares, own = [], torch.empty_like(hidden), [], []
        for part in parts:
            part_losses, logit_grads = self._logit_gradients(hidden[part].to(self._dtype), part, matrix)  # (n, T, V)
            losses.append(part_losses)
            hidden_grad[part] = (logit_grads @ matrix).masked_fill_(ignored[part, :, None], 0).to(hidden.dtype)
            squares.append(sequence_norms.of_matrix(self._hidden[part], logit_grads))
            if self._tokens is not None:
                columns = self._tokens[part, None].expand(-1, hidden.shape[1], -1)
                own.append(logit_grads.gather(2, columns))
            self._logit_grads = [logit_grads] if keeps else None
            del logit_grads  # before the next are made
        self.squared_norms = torch.cat(squares)
        if own:
            self._own_logit_grads = torch.cat(own)
        return torch.cat(losses).masked_fill_(ignored, 0), hidden_grad

    def product_with_embedding(self, grads: Tensor) -> Tensor:
        """(b,) float32: of each sequence, the inner product of the gradients that the one matrix has here and as the
        token embedding. grads: of the embeddings, (b, T, D).
        """
        return sequence_norms.product_with_embedding(self._own_logit_grads, self._hidden, grads)

    def gradient(self, factors: Tensor) -> Tensor:
        """(V, D) float32: the sum over sequences of their gradients of the weight, times their factors, (b,)."""
        total = torch.zeros_like(self._weight, dtype=torch.float32)
        matrix = self._weight.to(self._dtype)
        for part in self._parts():
            if self._logit_grads is not None:
                logit_grads = self._logit_grads.pop()
            else:
                _, logit_grads = self._logit_gradients(self._hidden[part], part, matrix)
            total += weighted_product(logit_grads, self._hidden[part], factors[part])
            del logit_grads
        return total

    def leave_out(self, sequences: Tensor) -> None:
        """Sequences, (b,) bool, count in `gradient` as if they had none, even if its numbers are not finite."""
        self._hidden[sequences] = 0
        if self._logit_grads is not None:
            self._logit_grads[0][sequences] = 0

    def _logit_gradients(self, hidden: Tensor, part: slice, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (n, T) and the gradients of logits (n, T, V) of some sequences, whose hidden states are (n, T, D)."""
        logits = hidden @ matrix.T
        losses = self._softmax.differentiate_(logits.flatten(0, 1), self._targets[part].flatten(), torch.float32, 1.0)
        return losses.view(logits.shape[:2]), logits

    def _at_once(self) -> int:
        """Sequences of whose tokens there are logits at once."""
        tokens = loss_chunk_tokens(self._weight.shape[0], self._dtype.itemsize, self._weight.device.type)
        return max(1, tokens // self._targets.shape[1])

    def _parts(self) -> Iterator[slice]:
        count = self._at_once()
        for start in range(0, len(self._targets), count):
            yield slice(start, start + count)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, layer: OutputLayer) -> Tensor:
        losses, hidden_grad = layer.differentiate(hidden, targets)
        ctx.save_for_backward(hidden_grad)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor, None, None]:
        (hidden_grad,) = ctx.saved_tensors
        return hidden_grad.mul_(loss_grad), None, None
