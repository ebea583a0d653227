"""The model that a checkpoint holds, with its tokenizer, for those who use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.rank_errors import on_all_ranks
from hvdlm.comm.replicas import broadcast_tensors
from hvdlm.config import Config
from hvdlm.config_reader import from_dict
from hvdlm.data.manifest import TOKENIZER
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.model.presets import PRESETS
from hvdlm.model.transformer import Transformer
from hvdlm.training import checkpoint
from hvdlm.training.checkpoint_contents import Checkpoint
from hvdlm.training.moving_average import weights_of


class TrainedModel(NamedTuple):
    """A checkpoint without its weights."""

    state: dict[str, Any]  # as `checkpoint.open_state` returns it
    config: Config
    tokenizer: Tokenizer


def open_trained(path: Path) -> TrainedModel:
    """That of a checkpoint, or of the newest one in a run directory. Raises HvdlmError if it cannot be read."""
    return trained_in(checkpoint.open_state(path))


def trained_in(state: dict[str, Any]) -> TrainedModel:
    """That of the checkpoint which has this state. Raises HvdlmError if settings of it are not known any more."""
    config = from_dict(state["config"], state["path"], PRESETS)
    return TrainedModel(state, config, Tokenizer.load(Path(state["path"]) / TOKENIZER))


def load_model(trained: TrainedModel, averaged: bool = False, communicator: Communicator | None = None) -> Transformer:
    """The model with its weights, on the CPU; with a communicator, rank 0 reads them and sends them to the others.

    `averaged`: the moving average of weights. Raises HvdlmError, JobError with a communicator, if they are of no use.
    """
    model = Transformer(trained.config.model, trained.state["vocab_size"])

    def read() -> None:
        if communicator is None or communicator.rank == 0:
            model.load_state_dict(weights_of(Checkpoint(Path(trained.state["path"])), averaged))

    if communicator is None:
        read()
    else:
        on_all_ranks(communicator, read)
        broadcast_tensors(communicator, model.parameters())
    return model.eval()
