"""Gradients of every step, where tensor ranks divide each matrix: ranks that have the same part sum theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdlm.comm.mesh import Mesh
from hvdlm.comm.replicas import broadcast_tensors
from hvdlm.config import Config
from hvdlm.parallel.tensor.layout import is_divided
from hvdlm.parallel.tensor.model import TensorParallelTransformer
from hvdlm.strategies.every_step import EveryStep


class TensorParallel(EveryStep):
    """Parameters and moments are this rank's part of them: equal on ranks of one place in the axis `tensor`."""

    def __init__(
        self, model: TensorParallelTransformer, optimizer: torch.optim.Optimizer, mesh: Mesh, config: Config
    ) -> None:
        super().__init__(model, optimizer, mesh.group("data", "shard"), config)
        self.everyone = mesh.everyone
        self._tensor_ranks = mesh["tensor"]
        self._replicated = [each for name, each in self._parameters.items() if not is_divided(name)]

    def norm(self) -> Tensor:
        """Each parameter counts once, also those that all tensor ranks have."""
        replicated = torch.stack(
            [torch.linalg.vector_norm(each.grad) for each in self._replicated if each.grad is not None]
        )
        own = torch.stack([self.sync.norm(), torch.linalg.vector_norm(replicated)])
        squares = self._tensor_ranks.all_gather(own).square()  # (ranks, 2)
        return (squares[:, 0].sum() - (len(squares) - 1) * squares[0, 1]).clamp(min=0).sqrt()

    def start(self) -> None:
        broadcast_tensors(self._tensor_ranks, self._replicated)
        super().start()
