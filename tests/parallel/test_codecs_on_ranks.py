"""codecs_body.py on 2 and 4 ranks; and the codec that is an example of one's own, as a user starts it."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import losses, records, train
from launcher import run_ranks

BODY = Path(__file__).with_name("codecs_body.py")
EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_codec" / "sign.py"


@pytest.mark.parametrize(
    ("engine", "launcher", "ranks", "algorithm"),
    [
        ("mpi", "mpirun", 2, "ring"),
        ("mpi", "mpirun", 2, "engine"),
        ("mpi", "mpirun", 4, "ring"),
        ("horovod", "horovodrun --gloo", 2, "engine"),
    ],
)
def test_codecs(engine: str, launcher: str, ranks: int, algorithm: str) -> None:
    result = run_ranks(launcher, ranks, [str(BODY), engine, algorithm])
    assert result.status == 0, result.output
    assert result.output.count("finished") == ranks


def test_the_example_of_a_codec_of_ones_own(small_data: Path, tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 50
    result = train("mpirun", 2, small_data, tmp_path / "run", compression__codec=f"{EXAMPLE}:Sign")
    assert result.status == 0, result.output
    curve = losses(tmp_path / "run")
    assert curve[50] < 0.75 * curve[1]
    # a bit for 32, and a scale for each of many small parameters
    assert all(20 < float(str(record["compression_ratio"])) <= 32 for record in records(tmp_path / "run"))
