"""`hvdlm export`: a checkpoint as a directory that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import torch

from hvdlm.data.staging import let_others_read, refuse_what_is_there, staged
from hvdlm.errors import HvdlmError
from hvdlm.hugging_face.architectures import CLASSES, architecture_of, to_config
from hvdlm.hugging_face.model_card import model_card
from hvdlm.hugging_face.tensor_files import write_tensors
from hvdlm.hugging_face.tokenizer_files import write_tokenizer
from hvdlm.hugging_face.weights import to_hugging_face
from hvdlm.training.checkpoint import save_failure
from hvdlm.training.checkpoint_contents import Checkpoint, not_finite
from hvdlm.training.moving_average import weights_of
from hvdlm.training.trained_model import open_trained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(checkpoint: Path, output: Path, dtype: str, shard_bytes: int, averaged: bool = False) -> int:
    """Writes config.json, weights in files of at most `shard_bytes`, the tokenizer, generation_config.json and a model
    card. `output` appears complete or not at all. Returns the exit status. `averaged`: the moving average of weights.

    Raises HvdlmError if transformers has no such architecture, or if `output` holds something already.
    """
    state, config, tokenizer = open_trained(checkpoint)
    architecture = architecture_of(config.model)
    refuse_what_is_there(output)
    with staged(output) as directory:
        settings = to_config(config.model, state["vocab_size"], tokenizer.eos_id, dtype)
        generation = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_id)
        for name, content in (("config.json", settings), ("generation_config.json", generation)):
            (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        weights = to_hugging_face(weights_of(Checkpoint(Path(state["path"])), averaged), config.model)
        weights = {name: each.to(DTYPES[dtype]) for name, each in weights.items()}
        if too_large := not_finite(weights):
            raise HvdlmError(f"{too_large} of {state['path']} does not fit into {dtype}: export bfloat16 or float32")
        try:
            write_tensors(directory, weights, shard_bytes)
        except safetensors.SafetensorError as error:
            raise HvdlmError(f"cannot write {output}: {save_failure(error)}") from None
        let_others_read(directory, like=directory / "config.json")
        write_tokenizer(directory, tokenizer, config.model.context_length)
        card = model_card(state, config, output.name, CLASSES[architecture], dtype, averaged)
        (directory / "README.md").write_text(card, encoding="utf-8")
    of = "the moving average of " if averaged else ""
    print(f"{output}: {CLASSES[architecture]}, {dtype}, of {of}{state['path']}")
    return 0
