"""`make train` without its set-up: in half of its steps it learns more than counting pairs of tokens would teach."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import records
from launcher import run

ROOT = Path(__file__).parents[2]


def loss(output: str, row: str) -> float:
    """The nats per token in a row of the table that `hvdlm evaluate` prints."""
    (line,) = [line for line in output.splitlines() if row in line]
    return next(float(word) for word in line.split() if word.replace(".", "", 1).isdigit())


@pytest.mark.timeout(1200)
def test_make_train_beats_the_bigram(tmp_path: Path) -> None:
    """Elsewhere than in the checkout, so that what a user has trained there is neither used nor changed."""
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    quickstart = (ROOT / "examples" / "quickstart.toml").read_text(encoding="utf-8")
    assert quickstart.count("steps = 800\n") == 1
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "quickstart.toml").write_text(quickstart.replace("steps = 800\n", "steps = 400\n"))
    # The environment that runs the tests is the one that set-up has made, here or elsewhere
    made = run(["make", "--old-file", ".venv/horovod.stamp", "train"], deadline=900, cwd=tmp_path)
    assert made.status == 0, made.output
    assert "== Training on 2 ranks: horovodrun -np 2 hvdlm train" in made.output
    _, sample = made.output.split("== A sample of what it learned\n")
    assert sample.startswith("def ") and len(sample) > 50, made.output
    assert {record["world_size"] for record in records(tmp_path / "runs" / "quickstart")} == {2}

    words = ["hvdlm", "evaluate", "runs/quickstart", "--data", "data/python-stdlib"]
    table = run(words, deadline=200, cwd=tmp_path)
    assert table.status == 0, table.output
    unigram, bigram, model = (loss(table.output, row) for row in ("1-gram", "2-gram", " model "))
    assert model < bigram < unigram
