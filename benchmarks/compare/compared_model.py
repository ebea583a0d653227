"""The model that all systems train, and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.script import as_overrides
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.model.presets import PRESETS

MODEL = {
    "model.layers": 6,
    "model.heads": 6,
    "model.width": 384,
    "model.context_length": 256,
    "train.micro_batch_size": 4,
    "train.precision": "bf16",
}


def configure(data: Path, micro_batches: int, overrides: Sequence[str]) -> Config:
    """The settings of every system, whose steps have so many micro-batches in all. Raises HvdlmError for unknown
    overrides, or without a data set.
    """
    DataSet(data)
    fixed = ["--data.path", str(data), "--train.threads", "1", "--train.steps", str(10**6), "--log.every", str(10**6)]
    fixed += ["--train.device", "cpu"]
    config = load(None, [*as_overrides(MODEL), *overrides, *fixed], PRESETS)
    train = config.train.model_copy(update={"global_batch_size": config.train.micro_batch_size * micro_batches})
    return config.model_copy(update={"train": train})
