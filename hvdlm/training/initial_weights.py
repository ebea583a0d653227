"""`model.from`: training begins with the weights of a checkpoint, whose model may have a smaller vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.rank_errors import on_rank_0
from hvdlm.comm.replicas import broadcast_tensors
from hvdlm.config import ModelSection
from hvdlm.data.shard import DataSet
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.model.transformer import Transformer, without_memory
from hvdlm.training import checkpoint
from hvdlm.training.checkpoint_contents import Checkpoint

if TYPE_CHECKING:
    from hvdlm.training.trainer import Trainer

# Settings of [model] that may be other ones than those of the weights
_FREE = {
    *("preset", "from", "vocab_size", "context_length", "dropout", "document_mask"),
    *("norm_eps", "rope_theta", "rope_scaling", "rope_low_frequency", "rope_high_frequency", "rope_original_context"),
}


def shape_of(path: str) -> dict[str, Any]:
    """The `[model]` of a checkpoint, its vocabulary's size included. Raises HvdlmError if there is none."""
    state = checkpoint.read_state(Path(path))
    model = {name: value for name, value in state["config"]["model"].items() if name not in ("preset", "from")}
    return {**model, "vocab_size": state["vocab_size"]}


def begin_with_weights(communicator: Communicator, trainer: Trainer) -> list[str]:
    """Starts a trainer with the weights of `model.from`, one parameter after the other, so that it may be one whose
    ranks have parts; returns what the user is to be told. Collective.

    Rows of tokens that the checkpoint's vocabulary does not have are as the model is initialised, positions beyond the
    context are left out. Raises JobError if the checkpoint is damaged, or its model has another shape.
    """
    section, opened = trainer.config.model, []

    def open_weights() -> list[str]:
        opened.append(checkpoint.open_checkpoint(Path(section.from_)))
        return _check_and_tell(opened[0], trainer.model, section, trainer.data)

    sentences = on_rank_0(communicator, open_weights)
    source = opened[0] if opened else None
    initial = without_memory(section, trainer.model.vocab_size).initial_values(trainer.config.train.seed)
    trainer.start(_weights(communicator, source, initial))
    return sentences


def _check_and_tell(source: Checkpoint, model: Transformer, section: ModelSection, data: DataSet) -> list[str]:
    state = source.state
    saved = ModelSection.model_validate(state["config"]["model"]).model_dump()
    for name, value in section.model_dump().items():
        if name not in _FREE and saved[name] != value:
            raise HvdlmError(f"model.from = {section.from_} has model.{name} = {saved[name]!r}, not {value!r}")
    vocabulary, positions = state["vocab_size"], saved["context_length"]
    if vocabulary > model.vocab_size:
        raise HvdlmError(
            f"model.from = {section.from_} has a vocabulary of {vocabulary} tokens: set model.vocab_size to that or "
            f"more, not {model.vocab_size}"
        )
    if section.position == "learned" and positions < section.context_length:
        raise HvdlmError(
            f"model.from = {section.from_} has learned {positions} positions: set model.context_length to that or "
            f"less, not {section.context_length}"
        )
    told = [f"training begins with the weights of {source.path}, step {state['step']}"]
    if Tokenizer.load(source.path / "tokenizer.json").sha256 != Tokenizer.load(data.tokenizer_path).sha256:
        told.append(f"{data.path} has another tokenizer than {source.path}: weights of tokens belong to that one's")
    return told


def _weights(
    communicator: Communicator, source: Checkpoint | None, initial: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Those of a checkpoint that rank 0 has open, over `initial` ones: on all ranks, one at a time. Collective."""
    for name, values in initial:
        on_rank_0(communicator, partial(_copy_rows, source, name, values))
        broadcast_tensors(communicator, [values])
        yield name, values


def _copy_rows(source: Checkpoint | None, name: str, values: Tensor) -> None:
    assert source is not None
    saved = source.tensor(name)
    rows = min(len(saved), len(values))
    values[:rows].copy_(saved[:rows])
