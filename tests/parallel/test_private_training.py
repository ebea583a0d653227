"""Runs with `[privacy]`: one curve on any number of ranks and after a stop, epsilon, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jobs import Ranks, assert_bit_identical, assert_same_curve, losses, records

from hvdlm.privacy.accountant import Accountant, Phase

DELTA = 1e-6
SETTINGS = {
    "privacy__clip_norm": 0.5,
    "privacy__noise_multiplier": 0.6,
    "privacy__delta": DELTA,
    "privacy__secure": "false",
    "privacy__accountant": "rdp",
}


def epsilon_of(run_dir: Path, step: int) -> dict[str, object]:
    state = json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    own: dict[str, object] = state["privacy"]
    return own


def test_one_curve_on_any_number_of_ranks_and_after_a_stop(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    for count in (1, 3):
        result = ranks.train(count, small_data, tmp_path / str(count), **SETTINGS)
        assert result.status == 0, result.output
    assert_same_curve(losses(tmp_path / "3"), losses(tmp_path / "1"), 1e-3)
    assert ranks.train(3, small_data, tmp_path / "stopped", stop_after=20, **SETTINGS).status == 75
    assert ranks.train(3, small_data, tmp_path / "stopped", "--resume", "latest", **SETTINGS).status == 0
    assert_bit_identical(tmp_path / "stopped", tmp_path / "3")
    saved = [epsilon_of(tmp_path / name, 50) for name in ("1", "3", "stopped")]
    assert saved[0] == saved[1] == saved[2]
    steps, noise, rate = saved[0]["history"][0]  # type: ignore[index]
    assert (steps, noise) == (50, 0.6)
    spent = [float(str(record["epsilon"])) for record in records(tmp_path / "3")]
    expected = [Accountant("rdp", DELTA).epsilon([Phase(step, 0.6, rate)]) for step in (1, 20, 50)]
    assert [spent[0], spent[19], spent[49]] == expected and saved[0]["epsilon"] == spent[49]


def test_training_ends_when_the_budget_is_spent(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Counting the steps of an earlier start with other noise; one more step would be too much."""
    assert ranks.train(2, small_data, tmp_path / "run", **{**SETTINGS, "train__steps": 5}).status == 0
    _, _, rate = epsilon_of(tmp_path / "run", 5)["history"][0]  # type: ignore[index]
    accountant, before = Accountant("rdp", DELTA), Phase(5, 0.6, rate)
    budget = sum(accountant.epsilon([before, Phase(steps, 0.7, rate)]) for steps in (12, 13)) / 2
    settings = {**SETTINGS, "privacy__noise_multiplier": 0.7, "privacy__target_epsilon": budget}
    result = ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", **settings)
    assert result.status == 0, result.output
    assert max(losses(tmp_path / "run")) == 17
    said = [str(each["message"]) for each in records(tmp_path / "run", "event") if each.get("ended")]
    assert said == [f"training ends here: another step would spend more than privacy.target_epsilon = {budget:g}"]
    assert epsilon_of(tmp_path / "run", 17)["history"] == [[5, 0.6, rate], [12, 0.7, rate]]


def test_documents_and_noise_of_the_system(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """With the noise that a budget takes; no two runs are alike."""
    settings = {**SETTINGS, "privacy__noise_multiplier": 0, "privacy__target_epsilon": 10.0, "train__steps": 6}
    settings |= {"privacy__secure": "true", "privacy__unit": "document", "model__dropout": 0.1}
    for name in ("one", "other"):
        result = ranks.train(2, small_data, tmp_path / name, **settings)
        assert result.status == 0, result.output
    assert losses(tmp_path / "one") != losses(tmp_path / "other")
    spent = epsilon_of(tmp_path / "one", 6)
    assert 9.9 < float(str(spent["epsilon"])) <= 10.0 and spent["unit"] == "document"


LOCAL = {"local_steps__every": 4, "local_steps__lr": 0.7, "local_steps__momentum": 0.9, "local_steps__fragments": 2}


def test_local_steps_under_masks(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """The curve is that without masks, up to rounding to 2^-24; after a stop, with other keys, bit for bit."""
    settings = {**SETTINGS, **LOCAL, "local_steps__overlap": 1}
    masked = {**settings, "compression__codec": "masked"}
    for name, own in (("plain", settings), ("masked", masked)):
        result = ranks.train(3, small_data, tmp_path / name, **own)
        assert result.status == 0, result.output
    assert "of each rank's, or node's, part of a batch has the whole noise" in result.output
    assert losses(tmp_path / "masked") != losses(tmp_path / "plain")
    assert_same_curve(losses(tmp_path / "masked"), losses(tmp_path / "plain"), 1e-4)
    assert ranks.train(3, small_data, tmp_path / "stopped", stop_after=22, **masked).status == 75
    assert ranks.train(3, small_data, tmp_path / "stopped", "--resume", "latest", **masked).status == 0
    assert_same_curve(losses(tmp_path / "stopped"), losses(tmp_path / "masked"), 0.0)
    assert epsilon_of(tmp_path / "stopped", 50) == epsilon_of(tmp_path / "plain", 50)


def test_masks_of_two_ranks_are_refused(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    result = ranks.train(2, small_data, tmp_path / "run", local_steps__every=4, compression__codec="masked")
    assert result.status == 1
    assert "hides nothing where two average: each knows the other's differences by the sum" in result.output


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"privacy__delta": 0.5}, "privacy.delta = 0.5 would allow for one of the"),
        ({"train__global_batch_size": 1_000_000}, "of which privacy.clip_norm draws each at most once"),
    ],
)
def test_what_the_data_set_is_too_small_for(
    settings: dict[str, object], sentence: str, ranks: Ranks, small_data: Path, tmp_path: Path
) -> None:
    result = ranks.train(2, small_data, tmp_path / "run", **{**SETTINGS, **settings})
    assert result.status == 1 and sentence in result.output
    assert not (tmp_path / "run").exists()


def test_a_run_without_privacy_cannot_go_on_with_it(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    assert ranks.train(2, small_data, tmp_path / "run", train__steps=5).status == 0
    result = ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", **SETTINGS)
    assert result.status == 1 and "no epsilon holds for what it has learned" in result.output
