"""The ways in which ranks combine their work, behind one interface: strategy.py."""

from __future__ import annotations

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.dion.strategy import Dion
from hvdlm.strategies.every_step import EveryStep
from hvdlm.strategies.local_steps.strategy import LocalSteps
from hvdlm.strategies.strategy import Strategy


def make_strategy(
    model: Transformer, optimizer: torch.optim.Optimizer, communicator: Communicator, config: Config
) -> Strategy:
    """The strategy that `config` asks for. Takes over `.grad` of all trainable parameters. Collective."""
    if config.local_steps.every:
        return LocalSteps(model, optimizer, communicator, config)
    if config.optimizer.algorithm == "dion":
        return Dion(model, optimizer, communicator, config)
    return EveryStep(model, optimizer, communicator, config)
