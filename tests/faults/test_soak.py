"""Three minutes under faults; soak.py alone takes as long as it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import INTERVAL, soak


@pytest.mark.thorough
@pytest.mark.needs_root
def test_a_job_under_faults(small_data: Path, tmp_path: Path) -> None:
    """A fault every 20 s: the last step is reached, with every step once and the curve of an undisturbed run."""
    outcome = soak(small_data, tmp_path / "disk", minutes=3)
    print(outcome)
    assert sum(outcome.faults.values()) > 60 / INTERVAL, outcome
