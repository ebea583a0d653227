"""The softmax over a vocabulary of whose logits each tensor rank has a part."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hvdlm.model.loss import Softmax, cached_rows
from hvdlm.parallel.tensor.collectives import TensorRanks
from hvdlm.parallel.tensor.layers import own_rows


class VocabularyParallelSoftmax(Softmax):
    """Ranks tell each other the largest logit of a token, the sum of exponentials and the target's logit.

    That is 4 numbers a token and rank, in one message for all tokens whose logits are there at once. Results are equal
    on all ranks.
    """

    def __init__(self, ranks: TensorRanks, rows: slice) -> None:
        """`rows`: of the vocabulary, that this rank has."""
        self._ranks, self._rows = ranks, rows

    def losses(self, logits: Tensor, targets: Tensor, precise: torch.dtype) -> tuple[Tensor, Tensor]:
        sums = self._sums(logits, targets, precise)
        return sums.losses, sums.is_likeliest

    def differentiate_(self, logits: Tensor, targets: Tensor, precise: torch.dtype, scale: float) -> Tensor:
        sums = self._sums(logits, targets, precise)
        columns, is_here = own_rows(targets, self._rows)
        for part in cached_rows(logits):
            shifted = logits[part].to(precise).sub_(sums.largest[part, None])
            gradient = shifted.sub_(sums.logarithms[part, None]).exp_()
            gradient.scatter_add_(1, columns[part, None], -is_here[part, None].to(precise))
            logits[part] = gradient if scale == 1 else gradient.mul_(scale)
        return sums.losses

    def _sums(self, logits: Tensor, targets: Tensor, precise: torch.dtype) -> _Sums:
        columns, is_here = own_rows(targets, self._rows)
        own = torch.empty(4, len(logits), dtype=precise, device=logits.device)
        for part in cached_rows(logits):
            scores = logits[part].to(precise)
            largest, likeliest = scores.max(dim=-1)
            own[0, part] = largest
            own[1, part] = (scores - largest[:, None]).exp_().sum(dim=-1)
            own[2, part] = scores.gather(1, columns[part, None]).squeeze(1).masked_fill(~is_here[part], 0)
            own[3, part] = (is_here[part] & (likeliest == columns[part])).to(precise)
        maxima, exponentials, target_logits, is_likeliest_here = self._ranks.gather(own).unbind(dim=1)  # (n, tokens)
        largest, rank = maxima.max(dim=0)
        logarithms = (exponentials * (maxima - largest).exp()).sum(dim=0).log()
        losses = logarithms - (target_logits.sum(dim=0) - largest)
        return _Sums(largest, logarithms, losses, is_likeliest_here.gather(0, rank[None])[0] > 0)


class _Sums(NamedTuple):
    """Of each of n tokens, over the whole vocabulary."""

    largest: Tensor  # (n,), the largest logit
    logarithms: Tensor  # (n,), of the sum of exponentials of logits minus the largest
    losses: Tensor  # (n,), nats
    is_likeliest: Tensor  # (n,) bool, whether the target has the largest logit
