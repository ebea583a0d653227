"""A GPT in plain PyTorch whose layers Opacus knows.

Its output matrix is not tied to the embedding, and positions are looked up by sequence: Opacus counts either wrong
otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvdlm.config import ModelSection
from one_rank.plain_gpt import PlainBlock


class UntiedGPT(nn.Module):
    """(B, T) int64 tokens to (B, T, V) logits."""

    def __init__(self, config: ModelSection, vocab_size: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config.width, config.heads, "tanh") for _ in range(config.layers))
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
