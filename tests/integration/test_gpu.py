"""Everything that needs a GPU, in one script that a user can run too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launcher import run

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1800)
def test_gpu_check() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    result = run([str(ROOT / "benchmarks" / "gpu_check.sh")], deadline=1500)
    assert result.status == 0, result.output
    assert "all GPU checks passed" in result.output
