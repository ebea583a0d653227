"""Layers between those that are divided, for ranks of which each has some tokens of a sequence."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from hvdlm.parallel.tensor.collectives import TensorRanks
from hvdlm.parallel.tensor.layout import part


class SequenceParallelRMSNorm(nn.RMSNorm):
    """RMSNorm of (B, T / n, D), whose gradient is that of all T tokens."""

    def __init__(self, like: nn.RMSNorm, ranks: TensorRanks) -> None:
        super().__init__(like.normalized_shape, like.eps)
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return functional.rms_norm(x, list(self.normalized_shape), self._ranks.shared(self.weight), self.eps)


class SequenceParallelLayerNorm(nn.LayerNorm):
    """LayerNorm of (B, T / n, D), whose gradients are those of all T tokens."""

    def __init__(self, like: nn.LayerNorm, ranks: TensorRanks) -> None:
        super().__init__(like.normalized_shape, like.eps, bias=like.bias is not None)
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self._ranks.shared(self.bias)
        return functional.layer_norm(x, list(self.normalized_shape), self._ranks.shared(self.weight), bias, self.eps)


class SequenceParallelPositions(nn.Embedding):
    """The embeddings of a rank's part of the positions, whose gradient is that of all."""

    def __init__(self, like: nn.Embedding, ranks: TensorRanks) -> None:
        super().__init__(like.num_embeddings, like.embedding_dim)
        self._ranks = ranks

    def forward(self, positions: Tensor) -> Tensor:
        """positions: (T,) of all tokens to (T / n, D)."""
        own = positions[part(len(positions), self._ranks.rank, self._ranks.size)]
        return functional.embedding(own, self._ranks.shared(self.weight))


def sequence_parallel_norm(norm: nn.Module, ranks: TensorRanks) -> nn.Module:
    """The same norm, of new parameters."""
    if isinstance(norm, nn.RMSNorm):
        return SequenceParallelRMSNorm(norm, ranks)
    assert isinstance(norm, nn.LayerNorm)
    return SequenceParallelLayerNorm(norm, ranks)
