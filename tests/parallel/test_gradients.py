"""gradients_body.py on 1, 2 and 4 ranks, and on 2 of every engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import run_ranks

BODY = Path(__file__).with_name("gradients_body.py")


@pytest.mark.parametrize(
    ("engine", "launcher", "ranks", "algorithm"),
    [
        ("solo", "none", 1, "engine"),
        ("mpi", "mpirun", 2, "engine"),
        ("mpi", "mpirun", 2, "ring"),
        ("mpi", "mpirun", 3, "ring"),
        ("mpi", "mpirun", 4, "engine"),
        ("mpi", "mpirun", 4, "ring"),
        ("torch", "mpirun", 2, "engine"),
        ("torch", "mpirun", 3, "ring"),
        ("horovod", "horovodrun --gloo", 2, "engine"),
        ("horovod", "horovodrun --mpi", 2, "engine"),
    ],
)
def test_gradients_equal_those_of_the_joined_batch(engine: str, launcher: str, ranks: int, algorithm: str) -> None:
    result = run_ranks(launcher, ranks, [str(BODY), engine, algorithm])
    assert result.status == 0, result.output
    assert result.output.count("finished") == ranks
