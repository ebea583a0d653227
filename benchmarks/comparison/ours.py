"""hvdlm as a contestant, by codec, and the limit: the same training with nobody to talk to."""

from __future__ import annotations

import torch

from comparison.contestant import Contestant, Exchange
from hvdlm.comm.communicator import Communicator
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config
from hvdlm.data.shard import DataSet
from hvdlm.training.trainer import Trainer


def with_codec(codec: str, config: Config, communicator: Communicator, data: DataSet) -> Contestant:
    """hvdlm's trainer, its gradients travelling by one of its codecs."""
    compression = config.compression.model_copy(update={"codec": codec})
    return _training(config.model_copy(update={"compression": compression}), communicator, data)


def alone(config: Config, data: DataSet) -> Contestant:
    """Every rank trains a model of its own, on as many sequences a step as it has in the other contestants."""
    train = config.train.model_copy(update={"batch_size": config.train.micro_batch_size})
    return _training(config.model_copy(update={"train": train}), SoloCommunicator(), data)


def _training(config: Config, communicator: Communicator, data: DataSet) -> Contestant:
    trainer = Trainer(config, communicator, data, data.vocab_size, torch.device("cpu"))
    loader = trainer.open_loader()

    def step() -> Exchange:
        trainer.train_step(loader, stop_here=False)
        return Exchange(trainer.sync.exposed_seconds, trainer.sync.traffic.wire_bytes)

    return Contestant(trainer.model, step)
