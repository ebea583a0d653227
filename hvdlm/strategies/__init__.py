"""The ways in which ranks combine their work, behind one interface: strategy.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdlm.comm.algorithm_probe import AlgorithmCost
from hvdlm.comm.mesh import Mesh
from hvdlm.config import Config
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.dion.strategy import Dion
from hvdlm.strategies.every_step import EveryStep
from hvdlm.strategies.local_steps.strategy import LocalSteps
from hvdlm.strategies.model_parallel import ModelParallel
from hvdlm.strategies.server.group import ServerGroup
from hvdlm.strategies.server.local_worker import LocalServedWorker
from hvdlm.strategies.server.served_model import ServedModel
from hvdlm.strategies.server.strategy import ServedWorker
from hvdlm.strategies.sharded.strategy import Sharded
from hvdlm.strategies.strategy import Strategy


def make_strategy(
    model: Transformer,
    optimizer: torch.optim.Optimizer | None,
    mesh: Mesh,
    config: Config,
    device: torch.device,
    algorithm_costs: Sequence[AlgorithmCost] = (),
    servers: ServerGroup | None = None,
) -> Strategy:
    """The strategy that `config` asks for. Takes over `.grad` of all trainable parameters. Collective.

    `optimizer`: over them; None with `parallel.shard`, where each rank has one over what it owns, and with `servers`
    unless this is a worker that makes local steps. `servers`: the parameter servers of the job, if it has some, or
    those that are processes of their own, of which this one may be one. `mesh`: of the job's ranks, but for servers,
    or of servers that are ranks of one job. `algorithm_costs`: what chooses between ring and engine, where that has
    been measured already.
    """
    if servers is not None and servers.is_server:
        return ServedModel(model, mesh.everyone, servers, config)
    if servers is not None and optimizer is not None:
        return LocalServedWorker(model, optimizer, mesh.everyone, servers, config)
    if servers is not None:
        return ServedWorker(model, mesh.everyone, servers, config)
    if config.parallel.shard:
        return Sharded(model, mesh, config, device)
    assert optimizer is not None
    if config.parallel.is_used:
        return ModelParallel(model, optimizer, mesh, config)
    communicator = mesh.everyone
    if config.local_steps.every:
        return LocalSteps(model, optimizer, communicator, config, algorithm_costs)
    if config.optimizer.algorithm == "dion":
        return Dion(model, optimizer, communicator, config, algorithm_costs)
    return EveryStep(model, optimizer, communicator, config, algorithm_costs=algorithm_costs)
