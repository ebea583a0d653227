"""Model FLOP utilisation of one rank, as benchmarks/one_rank.py measures it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher import run

pytestmark = [pytest.mark.needs_gpu, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("model", "system"), [("gpt2", "hvdlm bf16"), ("llama-1b", "hvdlm bf16"), ("gpt2", "hvdlm bf16 compiled")]
)
def test_one_rank(model: str, system: str, text_data: Path, tmp_path: Path, measured: Callable[[str], None]) -> None:
    """That it can be measured, and what it is; no bound, for which a machine would have to be known."""
    words = [sys.executable, str(ROOT / "benchmarks" / "one_rank.py"), "--data", str(text_data)]
    words += ["--output", str(tmp_path), "--rounds", "2", "--steps", "5"]
    result = run([*words, "--models", model, "--systems", system], deadline=220)
    assert result.status == 0, result.output
    (row,) = json.loads((tmp_path / "one_rank.json").read_text())[model]["rows"]
    share = row["utilisation"]
    utilisation = "peak not known" if share is None else f"utilisation {share:.1%}"
    memory = f"{row['memory_bytes'] / 1e9:.1f} GB, predicted {row['predicted_bytes'] / 1e9:.1f}"
    measured(f"{row['tokens_per_second']:,.0f} tokens/s, {utilisation}, {memory}")
    assert row["tokens_per_second"] > 0
    assert share is None or 0 < share < 1
