"""The stages of one rank: a Transformer that lacks the others' parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvdlm.config import ModelSection
from hvdlm.model.parameter_access import OUTPUT
from hvdlm.model.transformer import Transformer, without_memory
from hvdlm.parallel.pipeline.stages import Stage
from hvdlm.parallel.tensor.model import TensorParallelTransformer


class StageModel(Transformer):
    """Some stages of a model, each a chunk of this rank's. Parameters have the names of the whole model.

    If output and embedding are tied, the first and the last stage both have the matrix.
    """

    def __init__(
        self, config: ModelSection, vocab_size: int, stages: Sequence[Stage], device: torch.device, **whole: Any
    ) -> None:
        """Takes memory on `device` for the parameters of `stages` alone; `initialise` gives them values. `whole`: what
        else the class of the whole model is made with, where this is one of stages of another kind.
        """
        with torch.device("meta"):
            super().__init__(config, vocab_size, **whole)
        self.chunks = list(stages)
        names = [name for name, _ in self.named_parameters()]  # of the whole model
        for layer in range(config.layers):
            if not any(layer in stage.layers for stage in stages):
                self.blocks[layer] = nn.Identity()  # in its place, so that the others keep their numbers
        for module in ("token_embedding", "position_embedding", "final_norm", "output"):
            own = [name for name in names if name.partition(".")[0] == module]
            if not any(stage.holds(name, config.tie_embeddings) for stage in stages for name in own):
                setattr(self, module, None)
        own_layers = set(self.blocks.modules())
        self._linear = [layer for layer in self._linear if layer in own_layers]
        self.to_empty(device=device)

    @property
    def device(self) -> torch.device:
        """Of all parameters."""
        return next(self.parameters()).device

    @property
    def has_first_stage(self) -> bool:
        """Whether it reads tokens."""
        return self.chunks[0].is_first

    @property
    def has_last_stage(self) -> bool:
        """Whether it makes the loss."""
        return self.chunks[-1].is_last

    def in_two_stages(self) -> list[str]:
        """Parameters that the stage at the other end has, too: a matrix that is token embedding and output."""
        is_shared = self.config.tie_embeddings and self.has_first_stage != self.has_last_stage
        return ["token_embedding.weight"] if is_shared else []

    def not_counted(self) -> list[str]:
        """Those of them that are no part of a norm here, because the first stage counts them."""
        return self.in_two_stages() if self.has_last_stage else []

    def divide_backward_passes(self) -> None:
        """From now on `WeightGradients` makes the gradients of weights. Blocks must not be compiled."""
        for layer in self._linear:
            layer.leaves_out_weight_gradients = True

    def apply_chunk(self, chunk: int, x: Tensor | None, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """One stage. x: (B, T, D) from the stage before, or None for the first one, which reads tokens, (B, T) int64.

        documents: as of `forward`. Returns (B, T, D), of the last stage after the final norm.
        """
        stage = self.chunks[chunk]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if x is None:
            x = self.embed(tokens, positions)
        x = self.apply_blocks(stage.layers, x, positions, documents)
        if not stage.is_last:
            return x
        hidden: Tensor = self.final_norm(x)
        return self.parameter_access.before(OUTPUT, hidden) if self.parameter_access else hidden

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """As those of the whole model: each parameter begins with the same numbers whoever holds it."""
        yield from self.own_values(without_memory(self.config, self.vocab_size).initial_values(seed))

    def own_values(self, whole: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        own = dict(self.named_parameters())
        yield from super().own_values((name, values) for name, values in whole if name in own)


class TensorParallelStageModel(StageModel, TensorParallelTransformer):
    """Stages of a model whose matrices tensor ranks divide; they all have the same stages."""
