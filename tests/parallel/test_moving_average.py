"""The moving average of weights: by hand from the checkpoints of every step; resumed, validated, exported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from jobs import Ranks, command, records
from safetensors.torch import load_file
from torch import Tensor

from hvdlm.config import ModelSection
from hvdlm.model.transformer import Transformer

EMA = {
    "train__ema": 0.6,
    "train__steps": 16,
    "checkpoint__every": 1,
    "checkpoint__keep": 99,
    "train__evaluate_every": 8,
}


def saved(run_dir: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, and their averages."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    optimizer = load_file(path / "optimizer.safetensors")
    averages = {name.removeprefix("ema."): each for name, each in optimizer.items() if name.startswith("ema.")}
    return load_file(path / "model.safetensors"), averages


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one and one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.thorough
def test_by_hand_and_everywhere_one(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Decays of 1/10, 2/11, ... up to 6/10, from the parameters with which training begins."""
    run = tmp_path / "run"
    result = ranks.train(2, small_data, run, **{**EMA, "train__evaluate_sequences": 0})
    assert result.status == 0, result.output
    model = Transformer(
        ModelSection(layers=2, heads=2, width=32, context_length=32), len(saved(run, 1)[0]["token_embedding.weight"])
    )
    model.initialise(0)
    average = {name: each.detach().double() for name, each in model.named_parameters()}
    for step in range(16):
        parameters, averages = saved(run, step + 1)
        decay = min(0.6, (1 + step) / (10 + step))
        average = {name: decay * each + (1 - decay) * parameters[name].double() for name, each in average.items()}
        for name, expected in average.items():
            torch.testing.assert_close(averages[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(averages["token_embedding.weight"], parameters["token_embedding.weight"])

    last = records(run, "eval")[-1]
    words = ("evaluate", str(run), "--data", str(small_data), "--micro-batch-size", "3")
    for options, field in (((), "loss"), (("--ema",), "ema_loss")):
        shown = ranks.hvdlm(2, *words, *options)
        assert shown.status == 0, shown.output
        found = re.search(r"│ model +│ +([\d.]+)", shown.output)
        assert found and float(found[1]) == pytest.approx(evaluated(last, field), abs=6e-5), shown.output

    exported, back = tmp_path / "exported", tmp_path / "back"
    assert ranks.hvdlm(1, "export", str(run), "--to", "hf", str(exported), "--ema").status == 0
    assert ranks.hvdlm(1, "import", str(exported), "--output", str(back)).status == 0
    assert_equal(load_file(back / "model.safetensors"), averages)
    card = (exported / "README.md").read_text()
    assert "a moving average (train.ema = 0.6)" in card and f"{evaluated(last, 'ema_loss'):.4f} nats" in card
    texts = [ranks.hvdlm(1, "generate", str(run), "--temperature", "0", *each) for each in ((), ("--ema",))]
    assert [each.status for each in texts] == [0, 0]


def evaluated(record: dict[str, object], field: str) -> float:
    return float(str(record[field]))


@pytest.mark.parametrize("more", [{}, {"train__precision": "fp16", "compression__codec": "int4"}])
def test_resumed_exactly(more: dict[str, object], ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    settings = {**EMA, **more}
    overflow_at = (4,) if "train__precision" in more else ()
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ranks.train(2, small_data, whole, overflow_at=overflow_at, **settings).status == 0
    assert ranks.train(2, small_data, run, stop_after=7, overflow_at=overflow_at, **settings).status == 75
    assert ranks.train(2, small_data, run, "--resume", "latest", overflow_at=overflow_at, **settings).status == 0
    assert_equal(saved(run, 16)[1], saved(whole, 16)[1])
    assert records(run, "eval") == records(whole, "eval")
    if overflow_at:  # a step that is left out changes neither
        assert_equal(saved(whole, 4)[1], saved(whole, 3)[1])


def test_after_a_run_without_one(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """It begins with the parameters of the checkpoint."""
    settings = {**EMA, "train__ema": 0.0}
    assert ranks.train(2, small_data, tmp_path, stop_after=7, **settings).status == 75
    result = ranks.hvdlm(1, "evaluate", str(tmp_path), "--data", str(small_data), "--ema")
    assert result.status == 1 and "has no moving average of weights: leave out --ema" in result.output
    assert ranks.train(2, small_data, tmp_path, "--resume", "latest", **EMA).status == 0
    before, (after, average) = saved(tmp_path, 7)[0], saved(tmp_path, 8)
    decay = min(0.6, 8 / 17)
    for name, found in average.items():
        expected = decay * before[name] + (1 - decay) * after[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_not_in_local_steps(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    result = ranks.hvdlm(1, *command(small_data, tmp_path / "run", train__ema=0.9, local_steps__every=4)[1:])
    assert result.status == 1 and "it does not go with local_steps.every" in result.output
    assert not (tmp_path / "run").exists()
