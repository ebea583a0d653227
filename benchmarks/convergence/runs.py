"""The runs of a convergence study: `hvdlm train` by method and seed, skipped where finished, and what they measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.methods import Method
from common.processes import end_launcher, hvdlm_command, start_launcher
from common.script import as_overrides
from common.setups import Cluster
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.training.metrics import read_metrics

SETTINGS = {
    "model.position": "rope",
    "train.steps": 1200,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 8,
    "train.precision": "bf16",
    "train.evaluate_every": 100,
    "train.evaluate_sequences": 256,
    "optimizer.lr": 2e-3,
    "optimizer.warmup_steps": 100,
    "log.every": 30,
}


@dataclass(frozen=True)
class Variant:
    """A way to exchange, with or without error feedback."""

    method: Method
    error_feedback: bool

    @property
    def name(self) -> str:
        """As in tables and plots."""
        return self.method.name if self.error_feedback else f"{self.method.name}, no feedback"


@dataclass(frozen=True)
class Point:
    """A validation."""

    tokens: int  # trained on until then
    seconds: float  # of training until then, without validations
    loss: float  # nats per token


@dataclass(frozen=True)
class Run:
    """What one run measured."""

    variant: str
    seed: int
    points: list[Point]
    wire_bytes: int  # sent by rank 0 for the gradients of the last step
    whole_steps: int = 0  # uncompressed, before the codec starts


def configure(data: Path, overrides: Sequence[str]) -> Config:
    """The settings that all runs share. Raises HvdlmError for unknown overrides, or without a data set."""
    DataSet(data)
    return load(None, [*as_overrides(SETTINGS), *overrides, "--data.path", str(data)], PRESETS)


def run_config(config: Config, variant: Variant, seed: int, runs: Path) -> Config:
    """The settings of one run, whose directory is below `runs`."""
    feedback = "" if variant.error_feedback else "-no-feedback"
    directory = runs / f"{re.sub('[^A-Za-z0-9]+', '-', variant.method.text)}{feedback}-seed{seed}"
    train = config.train.model_copy(update={"seed": seed, "run_dir": str(directory)})
    compression = config.compression.model_copy(update={"error_feedback": variant.error_feedback})
    return variant.method.apply(config.model_copy(update={"train": train, "compression": compression}))


def is_finished(config: Config) -> bool:
    """Whether a run has trained its last step.

    Raises HvdlmError if its directory holds a run with other settings.
    """
    directory = Path(config.train.run_dir)
    settings = directory / "config.toml"
    if not settings.exists():
        return False
    if load(settings, [], PRESETS) != config:
        raise HvdlmError(f"{directory} holds a run with other settings: remove it, or give another --runs")
    return any(r["kind"] == "eval" and r["step"] == config.train.steps for r in _records(directory))


def train(cluster: Cluster, config: Config) -> int:
    """Trains, from the last checkpoint if there is one; returns the exit status."""
    directory = Path(config.train.run_dir)
    directory.parent.mkdir(parents=True, exist_ok=True)
    settings = directory.with_suffix(".toml")
    settings.write_text(config.to_toml(), encoding="utf-8")
    launcher = start_launcher([*cluster.launcher, hvdlm_command(), "train", str(settings), "--resume", "latest"])
    try:
        return launcher.wait()
    except BaseException:
        end_launcher(launcher)
        raise


def read_run(config: Config, variant: Variant) -> Run:
    """What a finished run measured."""
    seconds = 0.0
    step, wire_bytes = 0, 0
    points = []
    for record in _records(Path(config.train.run_dir)):
        if record["kind"] == "train":  # step_seconds is the mean over the steps since the last record of this kind
            seconds += record["step_seconds"] * (record["step"] - step)
            step, wire_bytes = record["step"], record["wire_bytes"]
        elif record["kind"] == "eval":
            points.append(Point(record["tokens"], seconds, record["loss"]))
    return Run(variant.name, config.train.seed, points, wire_bytes, config.compression.warmup_steps)


def _records(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []
