"""What takes part in a comparison: one way to train one model, ready for its next step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hvdlm.comm.communicator import Communicator
from hvdlm.config import Config
from hvdlm.data.loader import Loader
from hvdlm.data.shard import DataSet
from hvdlm.model.transformer import Transformer


@dataclass(frozen=True)
class Exchange:
    """What a contestant itself tells of the gradient exchange of one step, on this rank."""

    waited_seconds: float  # between the end of the backward pass and the arrival of the last gradient
    wire_bytes: int  # sent


@dataclass(frozen=True)
class Contestant:
    """`step` trains `model` on the next global batch; hvdlm's tell what the exchange took, peers cannot."""

    model: Transformer
    step: Callable[[], Exchange | None]


def open_loader(config: Config, data: DataSet, communicator: Communicator) -> Loader:
    """The batches that hvdlm's trainer would read, from the first on."""
    train = config.train
    share = (communicator.rank, communicator.size)
    return Loader(data, config.model.context_length, train.batch_size, train.seed, *share, config.data.read_ahead)
