"""A GPT in plain PyTorch, of the shape of a run's, whose layers Opacus knows.

Its output matrix is not tied to the embedding, and positions are looked up by sequence: Opacus counts either wrong
otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdlm.config import ModelSection
from hvdlm.model.size import mlp_width


class PlainGPT(nn.Module):
    """(B, T) int64 tokens to (B, T, V) logits."""

    def __init__(self, config: ModelSection, vocab_size: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        # Contiguous, because Opacus makes views of them
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(self.final_norm(x))
        return logits


class PlainBlock(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        width, hidden = config.width, mlp_width(config)
        self.heads = config.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        mlp: Tensor = self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))
        return x + mlp
