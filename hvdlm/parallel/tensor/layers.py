"""The layers of the Transformer of which each tensor rank has a part.

Shapes as in hvdlm/model/transformer.py, of the whole model; n ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvdlm.config import ModelSection
from hvdlm.model.attention import causal_attention
from hvdlm.model.linear import Linear
from hvdlm.model.size import mlp_width
from hvdlm.model.transformer import MLP, Attention
from hvdlm.parallel.tensor.collectives import TensorRanks
from hvdlm.parallel.tensor.layout import part


class ColumnParallelLinear(Linear):
    """Some outputs of a linear layer, of inputs that all ranks have.

    Called after the columns of W^T, as in the Megatron-LM paper: they are rows of `weight`.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, ranks: TensorRanks) -> None:
        """`outputs`: of this rank."""
        super().__init__(inputs, outputs, bias)
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, inputs), or (B, T / n, inputs) of ranks that divide the sequence, to (B, T, outputs)."""
        return super().forward(self._ranks.enter(x.to(self.compute_dtype)))  # cast before: gradients are sent so, too


class RowParallelLinear(Linear):
    """A linear layer of inputs of which each rank has some. The bias is added once, to the sum."""

    casts_bias = False

    def __init__(self, inputs: int, outputs: int, bias: bool, ranks: TensorRanks) -> None:
        """`inputs`: of this rank."""
        super().__init__(inputs, outputs, bias)
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, inputs) to (B, T, outputs), or (B, T / n, outputs) of ranks that divide the sequence."""
        product = self._ranks.leave(self.without_bias(x))
        return product if self.bias is None else product + self._ranks.shared(self.bias)


class VocabularyParallelEmbedding(nn.Embedding):
    """Embeddings of which each rank has those of consecutive tokens."""

    def __init__(self, vocab_size: int, width: int, ranks: TensorRanks) -> None:
        own = part(vocab_size, ranks.rank, ranks.size)
        super().__init__(own.stop - own.start, width)
        self.part = own
        self._ranks = ranks

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64 of the whole vocabulary, equal on all ranks, to (B, T, D) or (B, T / n, D)."""
        rows, is_here = own_rows(tokens, self.part)
        return self._ranks.leave(super().forward(rows).masked_fill(~is_here[..., None], 0))


class TensorParallelAttention(Attention):
    """Attention of H / n query heads, and of the K / n key and value heads that serve them."""

    def __init__(self, config: ModelSection, ranks: TensorRanks) -> None:
        super().__init__(config)
        self.heads //= ranks.size
        self.key_value_heads //= ranks.size
        rows = (self.heads + 2 * self.key_value_heads) * self.head_width
        self.qkv = ColumnParallelLinear(config.width, rows, config.bias or config.qkv_bias, ranks)
        self.output = RowParallelLinear(self.heads * self.head_width, config.width, config.bias, ranks)
        self._rank = ranks.rank
        self._attend_uncompiled = torch.compiler.disable(_attend_with_own_dropout)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        if not dropout:
            return super().attend(queries, keys, values, mask, dropout)
        attended: Tensor = self._attend_uncompiled(queries, keys, values, mask, dropout, self._rank)
        return attended


class TensorParallelMLP(MLP):
    """The MLP of some of the M hidden numbers."""

    def __init__(self, config: ModelSection, ranks: TensorRanks) -> None:
        super().__init__(config)
        own = part(mlp_width(config), ranks.rank, ranks.size)
        hidden = own.stop - own.start
        self.up = ColumnParallelLinear(config.width, 2 * hidden if self.gated else hidden, config.bias, ranks)
        self.down = RowParallelLinear(hidden, config.width, config.bias, ranks)


def own_rows(tokens: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Where tokens stand among some rows of the vocabulary, a valid index in any case; and whether they are there."""
    is_here = (tokens >= rows.start) & (tokens < rows.stop)
    return (tokens - rows.start).clamp(0, rows.stop - rows.start - 1), is_here


def _attend_with_own_dropout(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float, rank: int
) -> Tensor:
    """Random numbers are equal on all ranks, so that the residual stream is; those of heads are to differ.

    The seed is drawn from the common numbers: they go on behind it, and an activation checkpoint, which winds them
    back, draws it again.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    devices = [queries.device] if queries.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + rank)
        return causal_attention(queries, keys, values, mask, dropout)
