"""Runs whose global batch grows: one curve for any number of ranks, and for a run that goes on in the ramp."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import Ranks, assert_bit_identical, assert_same_curve, losses, records
from thorough import thorough

# 2 sequences in batches 0 to 7, 4 in 8 to 15, ..., 16 from 56 on; one of three ranks has none at first
RAMP = {"train__batch_ramp_start": 2, "train__batch_ramp_steps": 56}
LOCAL = {"local_steps__every": 4, "local_steps__fragments": 2, "compression__codec": "int4"}


def test_one_curve_on_any_number_of_ranks(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    for size in (1, 2, 3):
        result = ranks.train(size, small_data, tmp_path / str(size), **RAMP)
        assert result.status == 0, result.output
        assert_same_curve(losses(tmp_path / str(size)), losses(tmp_path / "1"), 1e-4)
        lines = records(tmp_path / str(size))
        done, expected = 0, []
        for batch in range(50):
            done += 32 * 2 * (1 + batch // 8)
            expected.append(done)
        assert [line["tokens"] for line in lines] == expected
    assert ranks.train(1, small_data, tmp_path / "constant").status == 0
    assert losses(tmp_path / "constant") != losses(tmp_path / "1")


@pytest.mark.parametrize("kind", ["every step", thorough("local steps")])
def test_resumed_in_the_ramp(kind: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    settings = {**RAMP, "compression__codec": "int4", **(LOCAL if kind == "local steps" else {})}
    assert ranks.train(2, small_data, tmp_path / "whole", **settings).status == 0
    for stop_after in (7, 19):  # with the last batch of a size, and in the middle of one
        run_dir = tmp_path / f"stopped_{stop_after}"
        assert ranks.train(2, small_data, run_dir, stop_after=stop_after, **settings).status == 75
        result = ranks.train(2, small_data, run_dir, "--resume", "latest", **settings)
        assert result.status == 0, result.output
        if kind == "every step":
            assert_bit_identical(run_dir, tmp_path / "whole")
        else:
            assert losses(run_dir) == losses(tmp_path / "whole")


def test_resumed_on_other_ranks(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    assert ranks.train(1, small_data, tmp_path / "whole", **RAMP).status == 0
    assert ranks.train(3, small_data, tmp_path / "run", stop_after=20, **RAMP).status == 75
    assert ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", **RAMP).status == 0
    assert_same_curve(losses(tmp_path / "run"), losses(tmp_path / "whole"), 1e-4)


def test_it_ends_by_tokens(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """8 batches of 64 tokens, 8 of 128, and 9 tokens: one of 192."""
    result = ranks.train(2, small_data, tmp_path / "run", train__max_tokens=8 * 192 + 9, **RAMP)
    assert result.status == 0, result.output
    assert "training ends here: train.max_tokens = 1,545 is reached" in result.output
    assert records(tmp_path / "run", "eval")[-1] | {"loss": 0, "accuracy": 0} == {
        "kind": "eval", "step": 17, "tokens": 8 * 192 + 192, "loss": 0, "accuracy": 0,
    }  # fmt: skip


def test_another_ramp_is_another_order(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    settings = {**RAMP, "train__steps": 6}
    assert ranks.train(1, small_data, tmp_path / "run", stop_after=3, **settings).status == 75
    settings["train__batch_ramp_steps"] = 57
    result = ranks.train(1, small_data, tmp_path / "run", "--resume", "latest", **settings)
    assert result.status == 1
    assert "was made with train.batch_ramp_steps = 56, not 57: resume with the same" in result.output
