"""The models and systems of one_rank.py, and the settings of each pair."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.script import as_overrides
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.model.presets import PRESETS

_SMALL = {"model.layers": 6, "model.heads": 6, "model.width": 384, "model.context_length": 256}

# Name: settings that differ from the preset's, and sequences per step
MODELS: dict[str, tuple[dict[str, object], int]] = {
    "gpt-10m": (_SMALL, 8),
    "gpt-10m-50k": ({**_SMALL, "model.vocab_size": 50304}, 8),
    "gpt2": ({"model.preset": "gpt2", "model.vocab_size": 50304}, 16),
    "gpt2-large": ({"model.preset": "gpt2-large", "model.vocab_size": 50304}, 16),
    "llama-1b": ({"model.preset": "llama-1b"}, 8),
}


@dataclass(frozen=True)
class System:
    """One way to train a model on one rank."""

    precision: str
    is_compiled: bool
    is_plain: bool  # plain PyTorch, not hvdlm


FP32_EAGER = "PyTorch fp32 eager"
AUTOCAST_EAGER = "PyTorch bf16 autocast eager"

SYSTEMS = {
    FP32_EAGER: System("fp32", is_compiled=False, is_plain=True),
    AUTOCAST_EAGER: System("bf16", is_compiled=False, is_plain=True),
    "hvdlm fp32": System("fp32", is_compiled=False, is_plain=False),
    "hvdlm bf16": System("bf16", is_compiled=False, is_plain=False),
    "hvdlm bf16 compiled": System("bf16", is_compiled=True, is_plain=False),
}


def configure(model: str, system: str, data: Path, threads: int, overrides: Sequence[str]) -> Config:
    """The settings of a system that trains a model; `threads` 0: one per core.

    Raises HvdlmError for unknown overrides.
    """
    settings, sequences = MODELS[model]
    chosen = {
        **settings,
        "data.path": data,
        "train.global_batch_size": sequences,
        "train.micro_batch_size": sequences,
        "train.precision": SYSTEMS[system].precision,
        "train.compile": str(SYSTEMS[system].is_compiled).lower(),
        "train.threads": threads or os.cpu_count(),
        "train.steps": 10**6,
        "log.every": 10**6,
    }
    return load(None, [*as_overrides(chosen), *overrides], PRESETS)
