"""A run on a mixture of sources: one curve for any number of ranks, also for a run that goes on with other ranks."""

from __future__ import annotations

import random
from pathlib import Path

from jobs import Ranks, assert_same_curve, losses

from hvdlm.data.mixture import WeightedPath
from hvdlm.data.prepare import prepare


def test_the_curve_of_a_mixture(ranks: Ranks, tmp_path: Path) -> None:
    """The second source is so small that it begins several epochs."""
    draw = random.Random(0)
    for name, letters, count in (("letters", "abcdefgh", 9000), ("digits", "0123456789", 700)):
        (tmp_path / f"{name}.txt").write_text("".join(draw.choice(letters) for _ in range(count)))
    mix = [WeightedPath(2, str(tmp_path / "letters.txt")), WeightedPath(1, str(tmp_path / "digits.txt"))]
    prepare([], tmp_path / "data", "byte", 2, 0.1, 1, "text", 0, skip_bad=False, mix=mix)
    curves = []
    for size in (1, 3):
        result = ranks.train(size, tmp_path / "data", tmp_path / str(size))
        assert result.status == 0, result.output
        curves.append(losses(tmp_path / str(size)))
    assert_same_curve(curves[1], curves[0], 1e-4)
    assert ranks.train(2, tmp_path / "data", tmp_path / "stopped", stop_after=20).status == 75
    result = ranks.train(3, tmp_path / "data", tmp_path / "stopped", "--resume", "latest")
    assert result.status == 0, result.output
    assert_same_curve(losses(tmp_path / "stopped"), curves[0], 1e-4)
