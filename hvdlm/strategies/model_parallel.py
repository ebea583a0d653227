"""Gradients of every step where each rank holds a part of the model: those with the same part sum them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvdlm.comm.mesh import Mesh
from hvdlm.config import Config
from hvdlm.gradients.norm import norm_of_parts
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.every_step import EveryStep


class ModelParallel(EveryStep):
    """EveryStep among the ranks that hold the same stages of a model, with one norm over all stages."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        mesh: Mesh,
        config: Config,
        not_counted: Sequence[str] = (),
    ) -> None:
        """`not_counted`: parameters that another stage has, too, and that are no part of the norm here. Collective."""
        super().__init__(model, optimizer, mesh.group("data", "shard"), config, everyone=mesh.everyone)
        self._counted = [parameter for name, parameter in self._parameters.items() if name not in not_counted]

    def norm(self) -> Tensor:
        """Each rank takes its part of every gradient, so that all ranks together have each number once."""
        replicas = self.communicator
        gradients = [parameter.grad.flatten() for parameter in self._counted if parameter.grad is not None]
        parts = [each.tensor_split(replicas.size)[replicas.rank] for each in gradients]
        return norm_of_parts(parts, self._everyone)

    @property
    def ranks_are_equal(self) -> bool:
        return False  # what one stage finds wrong with its weights, the others do not see
