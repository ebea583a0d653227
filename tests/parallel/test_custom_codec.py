"""The codec that is an example of one's own."""

from __future__ import annotations

from pathlib import Path

from jobs import Ranks, losses, records

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_codec" / "sign.py"


def test_the_example_of_a_codec_of_ones_own(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 50
    result = ranks.train(2, small_data, tmp_path / "run", compression__codec=f"{EXAMPLE}:Sign")
    assert result.status == 0, result.output
    curve = losses(tmp_path / "run")
    assert curve[50] < 0.75 * curve[1]
    # a bit for 32, and a scale for each of many small parameters
    assert len(records(tmp_path / "run")) == 50
    assert all(20 < float(str(record["compression_ratio"])) <= 32 for record in records(tmp_path / "run"))
