"""Benchmarks that check or show what ranks on a GPU do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launcher import launcher_command, run

pytestmark = [pytest.mark.needs_gpu, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.toml"


def test_sums_of_tensors(tmp_path: Path) -> None:
    """allreduce.py checks each sum by itself."""
    words = [sys.executable, str(ROOT / "benchmarks" / "allreduce.py"), "--device", "cuda", "--largest", "16mb"]
    words += ["--output", str(tmp_path), "--name", "gpu"]
    result = run([*launcher_command("mpirun", 2), *words], deadline=150)
    assert result.status == 0, result.output
    assert json.loads((tmp_path / "allreduce-gpu.json").read_text())


def test_trace_of_a_step(data: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "timeline.py"), str(QUICKSTART), "--data.path", str(data)]
    words += ["--train.device", "cuda", "--compression.codec", "fp16", "--output", str(tmp_path / "trace.json")]
    result = run([*launcher_command("mpirun", 2), *words], deadline=150)
    assert result.status == 0, result.output
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} == {0, 1}
