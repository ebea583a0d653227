"""Runs with local steps: one rank is plain training; a run that was stopped and resumed is the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import Ranks, assert_same_curve, losses, records, start_training
from safetensors.torch import load_file
from test_errors import sabotaged
from test_resume import as_if_killed, wait_for_step
from thorough import thorough

SETTINGS = {"checkpoint__every": 7, "train__check_replicas_every": 1, "model__dropout": 0.1}
# After step 14 a fragment is under way, and the other is between two rounds
STREAMING = {
    "local_steps__every": 4, "local_steps__fragments": 2, "local_steps__overlap": 2, "local_steps__warmup_steps": 3,
    "local_steps__lr": 0.9, "local_steps__momentum": 0.4, "compression__codec": "int4", "model__width": 64,
    "optimizer__lr": 0.002,
}  # fmt: skip


def weights(run_dir: Path, step: int = 50) -> dict:
    return load_file(run_dir / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("overlap", [0, 2])
def test_one_rank_alone_trains_as_without(overlap: int, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    settings = {"local_steps__every": 3, "local_steps__fragments": 2, "local_steps__overlap": overlap}
    assert ranks.train(1, small_data, tmp_path / "plain").status == 0
    result = ranks.train(1, small_data, tmp_path / "local", **settings, compression__codec="int4")
    assert result.status == 0, result.output
    assert_same_weights(tmp_path / "plain", tmp_path / "local")
    plain, ours = losses(tmp_path / "plain"), losses(tmp_path / "local")
    assert len(ours) > 15
    assert ours == {step: plain[step] for step in ours}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumed_with_a_round_under_way(precision: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """fp16: the gradients of one rank overflow, whose loss scale is then another."""
    settings = {**SETTINGS, **STREAMING, "train__precision": precision, "checkpoint__keep": 9}
    overflow_at = (10, 20) if precision == "fp16" else ()
    result = ranks.train(2, small_data, tmp_path / "whole", overflow_at=overflow_at, **settings)
    assert result.status == 0, result.output
    broken = tmp_path / "broken"
    as_if_killed(tmp_path / "whole", broken, 17)
    saved = broken / "checkpoints" / "step_00000014"
    assert any(name.startswith("average_difference.") for name in load_file(saved / "optimizer.safetensors"))
    first, second = (load_file(saved / "ranks" / f"rank_0000{rank}.safetensors") for rank in (0, 1))
    for kind in ("local.", "exp_avg.", "difference_residual.", "sent."):
        assert any(name.startswith(kind) and not first[name].equal(second[name]) for name in first), kind
    result = ranks.train(2, small_data, broken, "--resume", "latest", overflow_at=overflow_at, **settings)
    assert result.status == 0, result.output
    assert_same_weights(tmp_path / "whole", broken)
    assert losses(tmp_path / "whole") == losses(broken)


def test_killed_with_a_round_under_way(small_data: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, **STREAMING}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with start_training("mpirun", 2, small_data, whole, **settings) as job:
        assert job.finish(deadline=120).status == 0
    with start_training("mpirun", 2, small_data, broken, **settings) as job:
        wait_for_step(job, broken, 17)
        job.ranks()[-1].kill()
        assert job.finish(deadline=120).status != 0
    with start_training("mpirun", 2, small_data, broken, "--resume", "latest", **settings) as job:
        assert job.finish(deadline=120).status == 0
    assert_same_weights(whole, broken)


@pytest.mark.thorough
def test_resumed_on_another_number_of_ranks_or_otherwise(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """It goes on from the last averages, and says so."""
    settings = {**SETTINGS, **STREAMING, "model__dropout": 0, "checkpoint__keep": 9}
    whole = tmp_path / "whole"
    assert ranks.train(2, small_data, whole, **settings).status == 0
    every_step = {**settings, "local_steps__every": 0}
    for number, size, changed in ((0, 3, settings), (1, 2, {**settings, "local_steps__every": 3}), (2, 2, every_step)):
        run_dir = tmp_path / f"other{number}"
        as_if_killed(whole, run_dir, 17)
        result = ranks.train(size, small_data, run_dir, "--resume", "latest", **changed)
        assert result.status == 0, result.output
        said = [each["message"] for each in records(run_dir, "event")]
        assert any("goes on from the parameters that were averaged last" in each for each in said), said
        common = losses(whole).keys() & losses(run_dir).keys()
        assert len(common) > 5
        assert_same_curve(
            {step: losses(run_dir)[step] for step in common},
            {step: losses(whole)[step] for step in common},
            relative=0.1,
        )


def test_every_step_is_resumed_with_local_steps(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """All ranks then begin with the moments and the parameters of the checkpoint, which were equal."""
    settings = {**SETTINGS, **STREAMING, "model__dropout": 0, "checkpoint__keep": 9}
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert ranks.train(2, small_data, whole, **{**settings, "local_steps__every": 0}).status == 0
    as_if_killed(whole, run_dir, 17)
    assert ranks.train(2, small_data, run_dir, "--resume", "latest", **settings).status == 0
    assert max(records(run_dir, "train"), key=lambda each: each["step"])["rounds"] > 5


def test_stopped_by_a_signal(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """The ranks agree to stop where a round ends, and the run goes on as if nothing had been."""
    settings = {**SETTINGS, **STREAMING}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert ranks.train(2, small_data, whole, **settings).status == 0
    assert ranks.train(2, small_data, stopped, stop_after=12, **settings).status == 75
    assert 12 <= max(losses(stopped)) <= 16
    assert ranks.train(2, small_data, stopped, "--resume", "latest", **settings).status == 0
    assert_same_weights(whole, stopped)


def test_as_few_steps_as_hide_a_round(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """The choice is said, and a resumed run goes on with it."""
    settings = {**SETTINGS, **STREAMING, "local_steps__every": "auto", "local_steps__overlap": 0, "checkpoint__keep": 9}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ranks.train(2, small_data, whole, **settings).status == 0
    (said,) = [each["message"] for each in records(whole, "event") if "a round takes" in each["message"]]
    assert "local_steps.every = " in said
    as_if_killed(whole, broken, 17)
    assert ranks.train(2, small_data, broken, "--resume", "latest", **settings).status == 0
    assert_same_weights(whole, broken)
    (again,) = [each["message"] for each in records(broken, "event") if "a round takes" in each["message"]]
    assert again == said


@pytest.mark.parametrize("before", ["auto", 4, 0], ids=["not chosen yet", "another number", "every step"])
def test_a_resumed_run_times_its_first_steps(before: object, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, **STREAMING, "local_steps__overlap": 0, "checkpoint__keep": 9, "train__steps": 30}
    run_dir = tmp_path / "run"
    first = {**settings, "local_steps__every": before}
    assert ranks.train(2, small_data, run_dir, stop_after=7, **first).status == 75
    result = ranks.train(2, small_data, run_dir, "--resume", "latest", **{**settings, "local_steps__every": "auto"})
    assert result.status == 0, result.output
    said = [each for each in records(run_dir, "event") if "a round takes" in each["message"]]
    assert len(said) == 1
    assert said[0]["step"] >= 7 + 8
    assert records(run_dir, "train")[-1]["rounds"] > 1


@pytest.mark.parametrize("overlap", [thorough(0), 2])
def test_a_slow_rank_leaves_out_steps(overlap: int, small_data: Path, tmp_path: Path) -> None:
    """Rank 1 sleeps 200 ms in a step. What each has trained on is its weight: the averages stay equal on both."""
    settings = {**SETTINGS, **STREAMING, "local_steps__overlap": overlap, "local_steps__by": "seconds"}
    result = sabotaged("slow", 1, small_data, tmp_path / "run", **settings)
    assert result.status == 0, result.output
    lines = records(tmp_path / "run", "train")
    assert lines[-1]["step"] == 50
    # By the first round both train; rank 1 then leaves out most steps, of which it has half
    assert 0.2 < lines[-1]["left_out"] < 0.5, lines[-1]
    assert lines[-1]["loss"] < lines[0]["loss"]
