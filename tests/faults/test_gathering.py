"""What a collective operation returns while a rank dies in it: Open MPI may return no data, and no error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launcher import run
from test_elastic import MPIRUN
from thorough import thorough


@pytest.mark.parametrize("seed", [0, *map(thorough, range(1, 4))])
def test_nothing_is_gathered_that_nobody_has_sent(seed: int) -> None:
    script = Path(__file__).with_name("gathering.py")
    result = run([*MPIRUN, "6", sys.executable, str(script), str(seed)], deadline=60)
    assert result.status == 0, result.output
    assert "one rank is left" in result.output
