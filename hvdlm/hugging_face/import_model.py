"""`hvdlm import`: a model of transformers as a checkpoint, for `model.from`, `hvdlm evaluate` and `hvdlm generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors

from hvdlm.config import Config, ModelSection
from hvdlm.config_reader import from_dict
from hvdlm.data.staging import refuse_what_is_there, staged
from hvdlm.errors import HvdlmError
from hvdlm.hugging_face.architectures import from_config
from hvdlm.hugging_face.tensor_files import read_tensors
from hvdlm.hugging_face.tokenizer_files import read_tokenizer
from hvdlm.hugging_face.weights import from_hugging_face
from hvdlm.model.presets import PRESETS
from hvdlm.model.size import parameter_count
from hvdlm.training.checkpoint import save_failure, versions, write_files
from hvdlm.training.checkpoint_contents import not_finite


def import_model(source: Path, output: Path) -> int:
    """Writes a checkpoint of step 0, of float32 weights, which appears complete or not at all. Returns the exit status.

    Raises HvdlmError for what is no model of transformers, for one that our Transformer cannot express, and if `output`
    holds something already.
    """
    values, vocab_size = from_config(_read_json(source / "config.json"), str(source / "config.json"))
    config = from_dict({"model": values}, str(source / "config.json"), PRESETS)
    tokenizer = read_tokenizer(source)
    if tokenizer.vocab_size > vocab_size:
        raise HvdlmError(f"the tokenizer of {source} has {tokenizer.vocab_size} tokens, and its model {vocab_size}")
    refuse_what_is_there(output)
    weights = from_hugging_face(read_tensors(source), config.model, vocab_size, str(source))
    if name := not_finite(weights):
        raise HvdlmError(f"{source} is of no use: {name} holds NaN or infinite numbers")
    with staged(output) as directory:
        try:
            write_files(directory, 0, weights, {}, _state(config, vocab_size, source), tokenizer.content)
        except safetensors.SafetensorError as error:
            raise HvdlmError(f"cannot write {output}: {save_failure(error)}") from None
    print(
        f"{output}: {parameter_count(config.model, vocab_size):,} parameters, {_shape(config.model)}; begin with it by"
    )
    print(f"model.from = {str(output)!r}, and prepare data by --tokenizer {output / 'tokenizer.json'}")
    return 0


def _state(config: Config, vocab_size: int, source: Path) -> dict[str, Any]:
    """As of a run that has trained no step."""
    return {
        "step": 0,
        "config": config.model_dump(),
        "vocab_size": vocab_size,
        "world_size": 1,
        "fingerprint": "",
        "versions": versions(),
        "imported_from": str(source),
    }


def _shape(model: ModelSection) -> str:
    return f"{model.layers} layers, {model.heads} heads, width {model.width}, context {model.context_length}"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise HvdlmError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise HvdlmError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise HvdlmError(f"{file} is not the configuration of a model")
    return content
