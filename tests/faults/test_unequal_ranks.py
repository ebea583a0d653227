"""Ranks of unlike speed with `train.balance`: real ones, of which some rest for each sequence (dying.py)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from jobs import assert_same_curve, command, losses, records
from launcher import Result, launcher_command, run
from test_elastic import DYING, MPIRUN

BALANCED = {
    "train__balance": "true",
    "train__balance_every": 6,
    "train__check_replicas_every": 1,
    "optimizer__lr": 0.002,
    "comm__algorithm": "ring",
}


def train(
    ranks: int, plan: str, data: Path, run_dir: Path, *options: str, mpirun: list[str] | None = None, **settings: Any
) -> Result:
    """The job must end within 150 s and leave no process."""
    words = command(data, run_dir, *options, **{**BALANCED, **settings})[1:]
    launcher = [*mpirun, str(ranks)] if mpirun else launcher_command("mpirun", ranks)
    return run([*launcher, sys.executable, str(DYING), plan, *words], deadline=150)


def changes(run_dir: Path) -> list[dict[str, Any]]:
    return [dict(each) for each in records(run_dir, "event") if "shares" in each]


def test_shares_follow_speeds_and_the_curve_stays(small_data: Path, tmp_path: Path) -> None:
    """10 and 30 ms a sequence, from step 31 on 30 and 10: 12 and 4 of 16 sequences are best, then 4 and 12."""
    plan = "slow:0:0,slower:0:1,slower:30:0,slow:30:1"
    result = train(2, plan, small_data, tmp_path / "run", train__steps=60)
    assert result.status == 0, result.output
    done = changes(tmp_path / "run")
    before, after = ([each for each in done if (each["step"] > 30) == later] for later in (False, True))
    assert before[0]["old_shares"] == [8, 8] and before[0]["step"] <= 14
    assert re.match(r"rank 1 on \S+, the slowest, takes [2-4]\.\d\d times as long for a token as", before[0]["message"])
    assert re.match(r"rank 0 on \S+, the slowest, takes [2-4]\.\d\d times as long for a token as", after[-1]["message"])
    assert 10 <= before[-1]["shares"][0] <= 13 and 3 <= after[-1]["shares"][0] <= 6
    assert all(sum(each["shares"]) == 16 for each in done)
    even = train(2, "", small_data, tmp_path / "even", train__steps=60, train__balance="false")
    assert even.status == 0, even.output
    assert changes(tmp_path / "even") == []
    assert_same_curve(losses(tmp_path / "run"), losses(tmp_path / "even"), 1e-6)
    assert "straggler" not in result.output.partition("step 30/60")[0]


def test_shares_of_private_batches(small_data: Path, tmp_path: Path) -> None:
    """Poisson sampling gives them unlike sizes, of which a slow rank has its share; the curve is that of even ones."""
    private: dict[str, object] = {"privacy__clip_norm": 0.5, "privacy__noise_multiplier": 0.3, "privacy__delta": 1e-6}
    private |= {"privacy__secure": "false", "privacy__accountant": "rdp", "train__steps": 30}
    result = train(2, "slow:0:0,slower:0:1", small_data, tmp_path / "run", **private)
    assert result.status == 0, result.output
    (first, *_) = changes(tmp_path / "run")
    assert first["shares"][0] > 1.5 * first["shares"][1]
    even = train(2, "", small_data, tmp_path / "even", **{**private, "train__balance": "false"})
    assert even.status == 0, even.output
    assert_same_curve(losses(tmp_path / "run"), losses(tmp_path / "even"), 1e-4)


def test_a_run_that_goes_on_keeps_its_shares(small_data: Path, tmp_path: Path) -> None:
    """Nobody rests any more when it is resumed, and balance_every is longer than what is left."""
    run_dir = tmp_path / "run"
    assert train(2, "slower:0:1", small_data, run_dir, train__steps=20).status == 0
    (*_, last) = changes(run_dir)
    assert last["shares"][0] > 11
    options: dict[str, Any] = {"train__steps": 24, "train__balance_every": 50}
    result = train(2, "", small_data, run_dir, "--resume", "latest", **options)
    assert result.status == 0, result.output
    saved = [each["parts"]["members"] for each in states(run_dir)]
    assert saved[-1] == saved[0] and len(saved[0]) == 1
    unset = {**options, "train__steps": 26, "train__balance": "false"}
    assert train(2, "", small_data, run_dir, "--resume", "latest", **unset).status == 0
    assert states(run_dir)[-1]["parts"]["members"][0][2] == []


def states(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((run_dir / "checkpoints").glob("step_*/state.json"))]


def test_a_rank_dies_whose_share_was_small(small_data: Path, tmp_path: Path) -> None:
    """The other two keep the ratio of their shares; no sequence is lost, none trained on twice."""
    plan = "slow:0:0,slow:0:1,slower:0:2,update:25:2,slower:25:1"
    settings = {"train__steps": 45, "comm__elastic": "true", "comm__bucket_mb": 0.02}
    result = train(3, plan, small_data, tmp_path / "run", mpirun=MPIRUN, **settings)
    assert result.status == 0, result.output
    whole = train(1, "", small_data, tmp_path / "whole", train__steps=45)
    assert whole.status == 0, whole.output
    done = changes(tmp_path / "run")
    assert len(done[0]["shares"]) == 3 and done[0]["shares"][2] < 5
    assert len(done[-1]["shares"]) == 2 and done[-1]["shares"][0] > 9 and done[-1]["step"] > 26
    assert_same_curve(losses(tmp_path / "run"), losses(tmp_path / "whole"), 1e-4)
    own, expected = records(tmp_path / "run"), records(tmp_path / "whole")
    assert [each["tokens"] for each in own] == [each["tokens"] for each in expected]


def test_unequal_owners_of_optimizer_state_and_muon_s_matrices(small_data: Path, tmp_path: Path) -> None:
    for settings in ({"parallel__shard": 1}, {"optimizer__algorithm": "muon"}):
        run_dir = tmp_path / "-".join(settings)
        result = train(2, "slow:0:0,slower:0:1", small_data, run_dir, train__steps=24, **settings)
        assert result.status == 0, result.output
        assert 10 <= changes(run_dir)[-1]["shares"][0] <= 13
