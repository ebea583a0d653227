"""Ranks whose CPUs have other instructions: PyTorch rounds otherwise on one of them, and replicas stay equal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import command, losses, records
from launcher import Result, launcher_command, run
from thorough import thorough

pytestmark = pytest.mark.skipif(
    "AVX" not in torch.backends.cpu.get_cpu_capability(), reason="PyTorch has one kind of loops here"
)


def train_on_unlike_ranks(data: Path, run_dir: Path, **settings: Any) -> Result:
    """Of two ranks the second has no AVX; every step is followed by a comparison of parameters."""
    words = command(data, run_dir, **{"train__check_replicas_every": 1, **settings})
    first = [*launcher_command("mpirun", 1), *words]
    return run([*first, ":", "-np", "1", "env", "ATEN_CPU_CAPABILITY=default", *words])


@pytest.mark.thorough
def test_200_steps(small_data: Path, tmp_path: Path) -> None:
    """With what every rank computes for itself: clipping, penalties, decay, warm-up and a falling rate."""
    settings = {"optimizer__clip_norm": 0.5, "optimizer__l1": 1e-4, "optimizer__l2": 1e-3}
    result = train_on_unlike_ranks(small_data, tmp_path / "run", train__steps=200, **settings)
    assert result.status == 0, result.output
    curve = losses(tmp_path / "run")
    assert len(curve) == 200 and curve[200] < curve[1] - 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer__algorithm": "muon", "compression__codec": "int4"},
        thorough({"optimizer__algorithm": "dion", "compression__codec": "topk"}),
        thorough({"optimizer__algorithm": "lion", "compression__codec": "powersgd"}),
        thorough({"optimizer__algorithm": "sgd", "compression__codec": "bf16", "train__ema": 0.9}),
        thorough({"optimizer__algorithm": "adam", "compression__codec": "topk2"}),
        thorough({"optimizer__freeze_variance_after": 5, "compression__codec": "int8", "train__precision": "fp16"}),
        thorough({"local_steps__every": 4, "compression__codec": "int2"}),
        {"parallel__shard": 2, "compression__codec": "fp16"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_whatever_updates_and_travels(settings: dict[str, Any], small_data: Path, tmp_path: Path) -> None:
    result = train_on_unlike_ranks(small_data, tmp_path / "run", train__steps=16, **settings)
    assert result.status == 0, result.output
    assert len(records(tmp_path / "run")) >= 4  # of local steps, those in which ranks have met


def test_what_needs_more_is_refused(small_data: Path, tmp_path: Path) -> None:
    result = train_on_unlike_ranks(small_data, tmp_path / "run", parallel__tensor=2)
    assert result.status == 1, result.output
    (said,) = [line for line in result.output.splitlines() if "hvdlm: error: " in line]
    host, own = os.uname().nodename, torch.backends.cpu.get_cpu_capability()
    assert f"ranks differ in CPU capability: rank 0 on {host} has {own}, rank 1 on {host} has DEFAULT; " in said
    assert "parallel.tensor has ranks compute the same by PyTorch: set ATEN_CPU_CAPABILITY to the least" in said
    assert not (tmp_path / "run").exists()
