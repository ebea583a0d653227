"""gradients_body.py on 1, 2 and 4 ranks, and on 2 of every engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import run_ranks

BODY = Path(__file__).with_name("gradients_body.py")


@pytest.mark.parametrize(
    ("engine", "launcher", "ranks"),
    [
        ("solo", "none", 1),
        ("mpi", "mpirun", 2),
        ("mpi", "mpirun", 3),
        ("mpi", "mpirun", 4),
        ("torch", "mpirun", 2),
        ("horovod", "horovodrun --gloo", 2),
        ("horovod", "horovodrun --mpi", 2),
    ],
)
def test_gradients_equal_those_of_the_joined_batch(engine: str, launcher: str, ranks: int) -> None:
    result = run_ranks(launcher, ranks, [str(BODY), engine])
    assert result.status == 0, result.output
    assert result.output.count("finished") == ranks
