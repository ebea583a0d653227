"""The quickstart as it stands learns more than counting pairs of bytes would teach."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import run

ROOT = Path(__file__).parents[2]


def last_number(output: str, row: str) -> float:
    """The nats per token in a row of the table that `hvdlm evaluate` prints."""
    line = next(line for line in output.splitlines() if row in line)
    return next(float(word) for word in line.split() if word.replace(".", "", 1).isdigit())


@pytest.mark.timeout(1200)
def test_quickstart_beats_the_bigram(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in (
        "hvdlm prepare --input python-stdlib --tokenizer bpe:1024 --output data/python-stdlib",
        "horovodrun -np 2 hvdlm train examples/quickstart.toml",
        "hvdlm evaluate runs/quickstart --data data/python-stdlib",
    ):
        result = run(command.split(), deadline=900, cwd=tmp_path)
        assert result.status == 0, result.output
    unigram, bigram, model = (last_number(result.output, row) for row in ("unigram", "bigram", " model "))
    assert model < bigram < unigram
    sample = run(["hvdlm", "generate", "runs/quickstart", "--prompt", "import", "--tokens", "50"], cwd=tmp_path)
    assert sample.status == 0 and "import" in sample.output
