"""The ways in which ranks combine their work, behind one interface: strategy.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdlm.comm.algorithm_probe import AlgorithmCost
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mesh import Mesh
from hvdlm.config import Config
from hvdlm.model.transformer import Transformer
from hvdlm.parallel.tensor.model import TensorParallelTransformer
from hvdlm.strategies.dion.strategy import Dion
from hvdlm.strategies.every_step import EveryStep
from hvdlm.strategies.local_steps.strategy import LocalSteps
from hvdlm.strategies.strategy import Strategy
from hvdlm.strategies.tensor_parallel import TensorParallel


def make_strategy(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    communicator: Communicator,
    config: Config,
    algorithm_costs: Sequence[AlgorithmCost] = (),
    mesh: Mesh | None = None,
) -> Strategy:
    """The strategy that `config` asks for. Takes over `.grad` of all trainable parameters. Collective.

    `algorithm_costs`: what chooses between ring and engine, where that has been measured already. `mesh`: of the job's
    ranks, where they divide a model.
    """
    if isinstance(model, TensorParallelTransformer):
        assert mesh is not None
        return TensorParallel(model, optimizer, mesh, config)
    if config.local_steps.every:
        return LocalSteps(model, optimizer, communicator, config, algorithm_costs)
    if config.optimizer.algorithm == "dion":
        return Dion(model, optimizer, communicator, config, algorithm_costs)
    return EveryStep(model, optimizer, communicator, config, algorithm_costs=algorithm_costs)
