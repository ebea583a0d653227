"""The ways in which ranks combine their work, behind one interface: strategy.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdlm.comm.algorithm_probe import AlgorithmCost
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.mesh import Mesh
from hvdlm.config import Config
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.dion.strategy import Dion
from hvdlm.strategies.every_step import EveryStep
from hvdlm.strategies.local_steps.strategy import LocalSteps
from hvdlm.strategies.model_parallel import ModelParallel
from hvdlm.strategies.strategy import Strategy


def make_strategy(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    communicator: Communicator,
    config: Config,
    algorithm_costs: Sequence[AlgorithmCost] = (),
    mesh: Mesh | None = None,
    not_counted: Sequence[str] = (),
) -> Strategy:
    """The strategy that `config` asks for. Takes over `.grad` of all trainable parameters. Collective.

    `algorithm_costs`: what chooses between ring and engine, where that has been measured already. `mesh` and
    `not_counted`: where a rank holds a part of the model alone (model_parallel.py).
    """
    if mesh is not None:
        return ModelParallel(model, optimizer, mesh, config, not_counted)
    if config.local_steps.every:
        return LocalSteps(model, optimizer, communicator, config, algorithm_costs)
    if config.optimizer.algorithm == "dion":
        return Dion(model, optimizer, communicator, config, algorithm_costs)
    return EveryStep(model, optimizer, communicator, config, algorithm_costs=algorithm_costs)
