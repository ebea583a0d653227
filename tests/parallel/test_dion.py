"""Runs with Dion: it learns, whatever the ranks; a run that was stopped and resumed is the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import Ranks, assert_same_curve, losses, records
from safetensors.torch import load_file
from test_local_steps import assert_same_weights
from test_resume import as_if_killed
from thorough import thorough

DION = {
    "optimizer__algorithm": "dion", "optimizer__dion_rank": 8, "optimizer__dion_lr_ratio": 2.0, "model__width": 64,
    "train__check_replicas_every": 1,
}  # fmt: skip
SAVING = {"checkpoint__every": 7, "checkpoint__keep": 9}


@pytest.mark.parametrize(("precision", "codec"), [thorough("bf16", "none"), ("fp16", "int4")])
def test_resumed_exactly(precision: str, codec: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """On as many ranks bit for bit, dropout and all; fp16: steps before and after the checkpoint overflow."""
    settings = {**DION, **SAVING, "train__precision": precision, "compression__codec": codec, "model__dropout": 0.1}
    overflow_at = (10, 20) if precision == "fp16" else ()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = ranks.train(2, small_data, whole, overflow_at=overflow_at, **settings)
    assert result.status == 0, result.output
    as_if_killed(whole, broken, 17)
    saved = broken / "checkpoints" / "step_00000014"
    first, second = (load_file(saved / "ranks" / f"rank_0000{rank}.safetensors") for rank in (0, 1))
    momenta = [name for name in first if name.startswith("momentum.")]
    assert len(momenta) == 8 and not any(first[name].equal(second[name]) for name in momenta)
    optimizer = load_file(saved / "optimizer.safetensors")
    assert {tensor.shape[0] for name, tensor in optimizer.items() if name.startswith("dion_rank_8.")} == {8}
    assert not any(name.startswith("exp_avg.blocks.0.mlp.up.weight") for name in optimizer)
    result = ranks.train(2, small_data, broken, "--resume", "latest", overflow_at=overflow_at, **settings)
    assert result.status == 0, result.output
    assert_same_weights(whole, broken)
    assert losses(whole) == losses(broken)


def test_one_curve_for_any_number_of_ranks(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """3 ranks, which are stopped, go on as 1, and then as 2: the curve of 2 that never stopped."""
    settings = {**DION, "train__steps": 30}
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert ranks.train(2, small_data, whole, **settings).status == 0
    for size, stop_after, options in ((3, 10, ()), (1, 20, ("--resume", "latest")), (2, None, ("--resume", "latest"))):
        result = ranks.train(size, small_data, moved, *options, stop_after=stop_after, **settings)
        assert result.status == (75 if stop_after else 0), result.output
    assert_same_curve(losses(moved), losses(whole), relative=2e-3)


def test_it_learns_as_adamw_does_and_either_goes_on_from_the_other(
    ranks: Ranks, small_data: Path, tmp_path: Path
) -> None:
    """Other bytes too: less than half of them."""
    dion, adamw = tmp_path / "dion", tmp_path / "adamw"
    assert ranks.train(2, small_data, dion, **DION, **SAVING).status == 0
    assert ranks.train(2, small_data, adamw, **{**DION, "optimizer__algorithm": "adamw"}, **SAVING).status == 0
    ends = [sum(losses(run)[step] for step in range(41, 51)) / 10 for run in (dion, adamw)]
    assert ends[0] < 1.02 * ends[1] < 0.9 * losses(adamw)[1], ends
    sent = [records(run)[-1]["wire_bytes"] for run in (dion, adamw)]
    assert sent[0] < 0.5 * sent[1], sent
    for source, settings in (
        (dion, {**DION, "optimizer__algorithm": "adamw"}),
        (adamw, {**DION, "optimizer__dion_rank": 4}),
    ):
        as_if_killed(source, source.with_name(f"after_{source.name}"), 17)
        run_dir = source.with_name(f"after_{source.name}")
        result = ranks.train(2, small_data, run_dir, "--resume", "latest", **settings)
        assert result.status == 0, result.output
        said = " ".join(str(each["message"]) for each in records(run_dir, "event"))
        assert "optimizer.algorithm is " in said
        assert losses(run_dir)[50] < 0.95 * losses(run_dir)[15]
