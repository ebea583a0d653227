"""Gradients of every step, where ranks share each model: those that have the same part of it sum theirs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hvdlm.comm.mesh import Mesh
from hvdlm.comm.replicas import broadcast_tensors
from hvdlm.config import Config
from hvdlm.gradients.norm import norm_of_parts
from hvdlm.model.transformer import Transformer
from hvdlm.parallel.tensor.model import TensorParallelTransformer
from hvdlm.strategies.every_step import EveryStep
from hvdlm.strategies.held_parts import HeldParts
from hvdlm.strategies.model_part import ModelPart
from hvdlm.strategies.optimizer import state_kinds


class ModelParallel(EveryStep):
    """Parameters and moments are this rank's part of them: equal on ranks of one place in the axes of the model."""

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh, config: Config) -> None:
        self._part = ModelPart(model, mesh)
        super().__init__(model, optimizer, mesh.group("data", "shard"), config)
        self.everyone, self._tensor_ranks = mesh.everyone, mesh["tensor"]
        self._counted = [each for name, each in self._parameters.items() if self._part.counts[name]]

    def norm(self) -> Tensor:
        """Each number counts once, also those that several ranks of a model have."""
        copies = self.communicator
        gradients = [each.grad.reshape(-1) for each in self._counted if each.grad is not None]
        return norm_of_parts([each.tensor_split(copies.size)[copies.rank] for each in gradients], self.everyone)

    def held_parts(self) -> HeldParts:
        kinds = state_kinds(self._settings, self._part.shapes)
        return HeldParts(self._part.shapes, self._part.runs, kinds, self._part.saved(self.communicator.rank == 0))

    def start(self, parameters: Iterable[tuple[str, Tensor]] | None = None) -> None:
        if parameters is None and isinstance(self._model, TensorParallelTransformer):
            broadcast_tensors(self._tensor_ranks, self._model.replicated_parameters().values())
        super().start(parameters)
