"""Batches for systems that do not use hvdlm's trainer."""

from __future__ import annotations

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.data.loader import Loader
from hvdlm.data.shard import DataSet


def open_loader(config: Config, data: DataSet, communicator: Communicator) -> Loader:
    """The batches that hvdlm's trainer reads on this rank, from the first step on."""
    train = config.train
    share = (communicator.rank, communicator.size)
    return Loader(
        data, config.model.context_length, train.global_batch_size, train.seed, *share, config.data.read_ahead
    )
