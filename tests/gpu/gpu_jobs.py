"""Short jobs of `hvdlm train` on a GPU."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jobs import losses
from launcher import BIN, launcher_command, run
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.toml"
STEPS = 20


def command(data: Path, run_dir: Path, *options: str) -> list[str]:
    """`hvdlm train` of the quickstart in 20 steps on a GPU; later `options` win."""
    settings = {
        "data.path": data,
        "train.run_dir": run_dir,
        "train.steps": STEPS,
        "train.device": "cuda",
        "train.evaluate_sequences": 64,
        "train.check_replicas_every": 5,
        "optimizer.warmup_steps": 5,
        "optimizer.lr": 1e-3,  # at the quickstart's, without its warm-up, roundings grow a thousandfold in 20 steps
        "log.every": 1,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [str(BIN / "hvdlm"), "train", str(QUICKSTART), *words, *options]


def train(launcher: str, ranks: int, data: Path, run_dir: Path, *options: str) -> dict[int, float]:
    """Trains, and returns the training loss by step, of those steps that logged it; it must be finite."""
    result = run([*launcher_command(launcher, ranks), *command(data, run_dir, *options)], deadline=150)
    assert result.status == 0, result.output
    curve = losses(run_dir)
    assert max(curve) == STEPS
    assert all(math.isfinite(loss) for loss in curve.values()), curve
    return curve


def assert_same_weights(one: Path, other: Path) -> None:
    """Two runs of `STEPS` steps, bit for bit."""
    first, second = (load_file(run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)
