"""Runs that end before train.steps: on all ranks after one step, saved, validated, with status 0, and only once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import Ranks, losses, records
from thorough import thorough

TOKENS = 16 * 32  # of a step
STANDS_STILL = {"optimizer__algorithm": "sgd", "optimizer__momentum": 0.0, "optimizer__lr": 1e-30}


def ends(run_dir: Path) -> list[str]:
    return [str(each["message"]) for each in records(run_dir, "event") if each.get("ended")]


def assert_ended_at(run_dir: Path, step: int) -> None:
    """With a line of metrics, a validation and a checkpoint of it."""
    assert max(losses(run_dir)) == step
    assert records(run_dir, "eval")[-1]["step"] == step
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{step:08d}\n"


@pytest.mark.parametrize("limit", [10 * TOKENS, 9 * TOKENS + 1])
def test_tokens(limit: int, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """The run is that of as many steps, learning rate and all; with more tokens it goes on."""
    settings = {"train__max_tokens": limit}
    assert ranks.train(2, small_data, tmp_path / "steps", train__steps=10).status == 0
    result = ranks.train(2, small_data, tmp_path / "run", **settings)
    assert result.status == 0, result.output
    assert ends(tmp_path / "run") == [f"training ends here: train.max_tokens = {limit:,} is reached"]
    assert ends(tmp_path / "steps") == []
    assert_ended_at(tmp_path / "run", 10)
    assert losses(tmp_path / "run") == losses(tmp_path / "steps")
    model = "checkpoints/step_00000010/model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (tmp_path / "steps" / model).read_bytes()
    result = ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", **settings)
    assert result.status == 0 and "all 10 steps are done: nothing to train" in result.output
    result = ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", train__max_tokens=12 * TOKENS)
    assert result.status == 0
    assert_ended_at(tmp_path / "run", 12)


@pytest.mark.parametrize("every", [0, 4])
def test_time(every: int, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """In local steps at the end of a round. What all starts have taken counts."""
    settings = {"train__max_time": "1.5s", "local_steps__every": every, "train__steps": 1_000_000}
    result = ranks.train(2, small_data, tmp_path / "run", **settings)
    assert result.status == 0, result.output
    assert ends(tmp_path / "run") == ["training ends here: train.max_time = 1.5s is over"]
    last = max(losses(tmp_path / "run"))
    assert every == 0 or last % every == 0
    assert_ended_at(tmp_path / "run", last)
    result = ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", **settings)
    assert result.status == 0 and f"all {last} steps are done: nothing to train" in result.output
    assert_ended_at(tmp_path / "run", last)
    more = {**settings, "train__max_time": "1h", "train__steps": last + 8}
    assert ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", **more).status == 0
    assert_ended_at(tmp_path / "run", last + 8)


@pytest.mark.parametrize(
    ("more", "last"),
    [
        ({}, 9),
        thorough({"log__every": 100}, 9),
        ({"checkpoint__keep_best": "true"}, 9),
        thorough({"local_steps__every": 3}, 10),
        ({"local_steps__every": 5, "local_steps__fragments": 2, "local_steps__overlap": 2}, 10),
    ],
)
def test_patience(more: dict[str, object], last: int, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Of a model that stays as it is the first validation is the best: the second one after it ends the run. With local
    steps there is one more, in which the ranks become equal."""
    settings = {**STANDS_STILL, **more, "train__patience": 2, "train__evaluate_every": 3}
    said = ["training ends here: the validation loss was not better train.patience = 2 times in a row"]
    result = ranks.train(2, small_data, tmp_path / "whole", **settings)
    assert result.status == 0, result.output
    assert ends(tmp_path / "whole") == said
    assert_ended_at(tmp_path / "whole", last)
    state = json.loads((tmp_path / "whole" / f"checkpoints/step_{last:08d}/state.json").read_text())
    rounds = state.get("local_steps", {"fragments": [], "under_way": []})
    assert rounds["under_way"] == [] and all(each["steps"] == 0 for each in rounds["fragments"])
    assert ranks.train(2, small_data, tmp_path / "run", stop_after=7, **settings).status == 75
    assert ends(tmp_path / "run") == []
    assert ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", **settings).status == 0
    assert ends(tmp_path / "run") == said
    assert_ended_at(tmp_path / "run", last)
    result = ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", **settings)
    assert result.status == 0 and f"all {last} steps are done: nothing to train" in result.output


def test_patience_lasts_while_it_improves(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    settings = {"train__patience": 1, "train__evaluate_every": 5, "train__steps": 20}
    assert ranks.train(1, small_data, tmp_path / "run", **settings).status == 0
    assert_ended_at(tmp_path / "run", 20)
    assert ends(tmp_path / "run") == []
