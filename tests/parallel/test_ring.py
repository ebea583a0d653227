"""ring_body.py on 1 to 4 ranks, and on the engines that have messages between ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import run_ranks

BODY = Path(__file__).with_name("ring_body.py")


@pytest.mark.parametrize(
    ("engine", "launcher", "ranks"),
    [("solo", "none", 1), ("mpi", "mpirun", 2), ("mpi", "mpirun", 3), ("mpi", "mpirun", 4), ("torch", "mpirun", 3)],
)
def test_ring(engine: str, launcher: str, ranks: int) -> None:
    result = run_ranks(launcher, ranks, [str(BODY), engine])
    assert result.status == 0, result.output
    assert result.output.count("finished") == ranks
