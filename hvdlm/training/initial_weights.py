"""`model.from`: training begins with the weights of a checkpoint, whose model may have a smaller vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hvdlm.config import ModelSection
from hvdlm.data.shard import DataSet
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.model.transformer import Transformer
from hvdlm.training import checkpoint

# Settings of [model] that may be other ones than those of the weights
_FREE = {
    *("preset", "from", "vocab_size", "context_length", "dropout", "document_mask"),
    *("norm_eps", "rope_theta", "rope_scaling", "rope_low_frequency", "rope_high_frequency", "rope_original_context"),
}

# Parameters with a row for each token, and for each position
_BY_TOKEN = ("token_embedding.weight", "output.weight")
_BY_POSITION = "position_embedding.weight"


def shape_of(path: str) -> dict[str, Any]:
    """The `[model]` of a checkpoint, its vocabulary's size included. Raises HvdlmError if there is none."""
    state = checkpoint.read_state(Path(path))
    model = {name: value for name, value in state["config"]["model"].items() if name not in ("preset", "from")}
    return {**model, "vocab_size": state["vocab_size"]}


@torch.no_grad()
def begin_with_weights(model: Transformer, section: ModelSection, data: DataSet) -> list[str]:
    """Copies the weights of `model.from` into a model that has been initialised; returns what the user is to be told.

    Rows of tokens that the checkpoint's vocabulary does not have stay as they are, positions beyond the context are
    left out. Raises HvdlmError if the checkpoint is damaged, or its model has another shape.
    """
    source = checkpoint.open_checkpoint(Path(section.from_))
    state = source.state
    saved = ModelSection.model_validate(state["config"]["model"]).model_dump()
    for name, value in section.model_dump().items():
        if name not in _FREE and saved[name] != value:
            raise HvdlmError(f"model.from = {section.from_} has model.{name} = {saved[name]!r}, not {value!r}")
    weights = source.model()
    for name, parameter in model.named_parameters():
        weight = weights[name]
        if name in _BY_TOKEN and len(weight) > len(parameter):
            raise HvdlmError(
                f"model.from = {section.from_} has a vocabulary of {len(weight)} tokens: set model.vocab_size to that "
                f"or more, not {len(parameter)}"
            )
        if name == _BY_POSITION and len(weight) < len(parameter):
            raise HvdlmError(
                f"model.from = {section.from_} has learned {len(weight)} positions: set model.context_length to that "
                f"or less, not {len(parameter)}"
            )
        rows = min(len(weight), len(parameter))
        parameter[:rows].copy_(weight[:rows])
    told = [f"training begins with the weights of {source.path}, step {state['step']}"]
    if Tokenizer.load(source.path / "tokenizer.json").sha256 != Tokenizer.load(data.tokenizer_path).sha256:
        told.append(f"{data.path} has another tokenizer than {source.path}: weights of tokens belong to that one's")
    return told
