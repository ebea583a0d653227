"""Runs on a mixture of sources: one curve for any number of ranks, also for one that goes on with other ranks; and the
losses of sources."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from jobs import Ranks, assert_same_curve, losses, records

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
    rate = {"optimizer__lr": 0.001}  # a high one amplifies rounding
    for size in (1, 3):
        result = ranks.train(size, tmp_path / "data", tmp_path / str(size), **rate)
        assert result.status == 0, result.output
        curves.append(losses(tmp_path / str(size)))
    assert_same_curve(curves[1], curves[0], 1e-5)
    assert ranks.train(2, tmp_path / "data", tmp_path / "stopped", stop_after=20, **rate).status == 75
    result = ranks.train(3, tmp_path / "data", tmp_path / "stopped", "--resume", "latest", **rate)
    assert result.status == 0, result.output
    assert_same_curve(losses(tmp_path / "stopped"), curves[0], 1e-5)


def test_losses_of_sources(ranks: Ranks, tmp_path: Path) -> None:
    """In training and in `hvdlm evaluate`, on any number of ranks: letters are harder to guess than one digit."""
    draw = random.Random(0)
    for name, letters in (("letters", "abcdefgh"), ("[b]digit", "0")):
        (tmp_path / f"{name}.txt").write_text("".join(draw.choice(letters) for _ in range(9000)))
    mix = [WeightedPath(1, str(tmp_path / f"{name}.txt")) for name in ("letters", "[b]digit")]
    prepare([], tmp_path / "data", "byte", 2, 0.1, 1, "text", 0, skip_bad=False, mix=mix)
    tables = []
    for size in (1, 3):
        run_dir = tmp_path / str(size)
        result = ranks.train(size, tmp_path / "data", run_dir, train__steps=20, train__evaluate_sequences=0)
        assert result.status == 0, result.output
        (record,) = records(run_dir, "eval")
        letters, digit = (float(str(record[f"{each.path}/loss"])) for each in mix)
        assert digit < 0.5 * letters
        assert record["loss"] == pytest.approx((letters + digit) / 2, rel=1e-3)  # about as many tokens of each
        result = ranks.hvdlm(size, "evaluate", str(tmp_path / "1"), "--data", str(tmp_path / "data"), COLUMNS="200")
        rows = dict(re.findall(r"│ +(\S+) +│ +([\d.]+) │", result.output))
        tables.append([float(rows[each.path]) for each in mix])
        if size == 1:
            assert tables[0] == pytest.approx([letters, digit], rel=0, abs=5.1e-5)
    assert tables[0] == tables[1]
