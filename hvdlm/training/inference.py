"""`hvdlm evaluate` and `hvdlm generate`: the validation loss of a checkpoint, and text that its model continues."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hvdlm.comm.communicator import Communicator
from hvdlm.config import ModelSection, from_dict
from hvdlm.data.baselines import ngram_baselines
from hvdlm.data.shard import DataSet
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError, JobError
from hvdlm.model.generate import generate as continue_prompt
from hvdlm.model.presets import PRESETS
from hvdlm.model.transformer import Transformer
from hvdlm.training import checkpoint, evaluation
from hvdlm.training.hardware import choose_device, share_cores
from hvdlm.training.job import job
from hvdlm.training.precision import DTYPES
from hvdlm.training.rank_errors import on_all_ranks, on_rank_0
from hvdlm.training.replicas import broadcast_tensors


def evaluate(path: Path, data_path: Path, engine: str, micro_batch_size: int) -> int:
    """Prints loss, perplexity, bits per byte and accuracy of a checkpoint beside n-gram baselines."""
    with job(engine, timeout=300, config_digest=str((path, data_path, micro_batch_size))) as communicator:
        if micro_batch_size < 1:
            raise JobError(f"--micro-batch-size {micro_batch_size}: give 1 or more")
        data = on_all_ranks(communicator, lambda: DataSet(data_path))
        state = on_rank_0(communicator, lambda: _open_for(data, path))
        config = from_dict(state["config"], state["path"], PRESETS)
        device = choose_device("auto", communicator)
        share_cores(0, communicator)
        model = _load_model(state, config.model, communicator).to(device)
        model.set_compute_dtype(DTYPES[config.train.precision])
        result = evaluation.evaluate(model, data, communicator, micro_batch_size)
        baselines = on_rank_0(communicator, lambda: ngram_baselines(data))
        if communicator.rank == 0:
            table = Table(title=f"{state['path']} on {data_path}, {result.tokens:,} tokens", title_justify="left")
            for column in ("", "nats per token", "perplexity", "bits per byte", "accuracy"):
                table.add_column(column, justify="right" if column else "left")
            bits_per_nat = result.bits_per_byte(data) / result.loss
            for name, loss in (("unigram baseline", baselines.unigram), ("bigram baseline", baselines.bigram)):
                table.add_row(name, f"{loss:.4f}", f"{math.exp(loss):.2f}", f"{loss * bits_per_nat:.4f}", "")
            table.add_row(
                "model",
                f"{result.loss:.4f}",
                f"{result.perplexity:.2f}",
                f"{result.bits_per_byte(data):.4f}",
                f"{result.accuracy:.2%}",
            )
            Console(highlight=False).print(table)
    return 0


def generate(path: Path, prompt: str, tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> int:
    """Prints a continuation of `prompt`, which an empty one begins a new document."""
    state = checkpoint.open_state(path)
    tokenizer = Tokenizer.load(Path(state["path"]) / "tokenizer.json")
    model = _load_model(state, ModelSection.model_validate(state["config"]["model"]))
    ids = torch.tensor(tokenizer.encode(prompt) or [tokenizer.eos_id])
    ids = continue_prompt(model, ids, tokens, temperature, top_k, top_p, seed, tokenizer.eos_id)
    print(tokenizer.decode([token for token in ids.tolist() if token != tokenizer.eos_id]))
    return 0


def _open_for(data: DataSet, path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose model reads the same tokens as the data set."""
    state = checkpoint.open_state(path)
    if Tokenizer.load(Path(state["path"]) / "tokenizer.json").sha256 != Tokenizer.load(data.tokenizer_path).sha256:
        raise HvdlmError(f"{state['path']} was trained with another tokenizer than {data.path} was prepared with")
    return state


def _load_model(state: dict[str, Any], config: ModelSection, communicator: Communicator | None = None) -> Transformer:
    """The model of a checkpoint, on the CPU; with a communicator, rank 0 reads it and sends it to the others."""
    model = Transformer(config, state["vocab_size"])
    if communicator is None or communicator.rank == 0:
        model.load_state_dict(checkpoint.Checkpoint(Path(state["path"])).model())
    if communicator is not None:
        broadcast_tensors(communicator, model.parameters())
    return model.eval()
