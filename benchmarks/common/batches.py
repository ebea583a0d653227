"""Batches for systems that do not use hvdlm's trainer."""

from __future__ import annotations

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.data.loader import Loader
from hvdlm.data.rank_parts import RankParts
from hvdlm.data.shard import DataSet


def open_loader(config: Config, data: DataSet, communicator: Communicator) -> Loader:
    """The batches that hvdlm's trainer reads on this rank, from the first step on."""
    train = config.train
    parts = RankParts(train.batch_sizes, communicator.size)
    length, read_ahead = config.model.context_length, config.data.read_ahead
    return Loader(data, length, parts, train.seed, communicator.rank, read_ahead)
