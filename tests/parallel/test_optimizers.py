"""Each optimizer on ranks: resumed exactly, and the same curve on one rank as on three, every step or local steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jobs import Ranks, assert_same_curve, losses
from test_local_steps import assert_same_weights

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer__algorithm": "adam", "optimizer__weight_decay": 1e-4},
    "sgd": {"optimizer__algorithm": "sgd", "optimizer__lr": 0.1, "optimizer__nesterov": "true"},
    "lion": {"optimizer__algorithm": "lion", "optimizer__lr": 1e-3},
    "muon": {"optimizer__algorithm": "muon"},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resumed_exactly(kind: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    settings = OPTIMIZERS[kind]
    assert ranks.train(2, small_data, tmp_path / "whole", **settings).status == 0
    assert ranks.train(2, small_data, tmp_path / "run", stop_after=7, **settings).status == 75
    assert ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", **settings).status == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


# A sign turns a difference in rounding into one of the update; Muon rounds to bfloat16
@pytest.mark.parametrize(("kind", "relative"), [("adam", 1e-4), ("sgd", 1e-4), ("muon", 2e-3)])
def test_one_curve_on_any_number_of_ranks(
    kind: str, relative: float, ranks: Ranks, small_data: Path, tmp_path: Path
) -> None:
    settings = {**OPTIMIZERS[kind], "train__steps": 20}
    for size in (1, 3):
        assert ranks.train(size, small_data, tmp_path / str(size), **settings).status == 0
    curves = [losses(tmp_path / str(size)) for size in (1, 3)]
    assert_same_curve(*curves, relative)
    assert curves[0][20] < curves[0][1] - 0.3


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_local_steps_resumed(kind: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    settings = {**OPTIMIZERS[kind], "train__steps": 12, "local_steps__every": 4, "compression__codec": "int4"}
    assert ranks.train(2, small_data, tmp_path / "whole", **settings).status == 0
    assert ranks.train(2, small_data, tmp_path / "run", stop_after=6, **settings).status == 75
    assert ranks.train(2, small_data, tmp_path / "run", "--resume", "latest", **settings).status == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


REGULARISED: dict[str, Any] = {"optimizer__l1": 1e-3, "optimizer__l2": 1e-2, "data__token_dropout": 0.2}


def test_regularised_runs_are_resumed_and_are_those_of_any_number_of_ranks(
    ranks: Ranks, small_data: Path, tmp_path: Path
) -> None:
    """Random tokens are those of the batch, whoever reads it; each setting makes another curve."""
    settings = {**REGULARISED, "train__steps": 12}
    assert ranks.train(1, small_data, tmp_path / "alone", **settings).status == 0
    assert ranks.train(3, small_data, tmp_path / "run", stop_after=6, **settings).status == 75
    assert ranks.train(3, small_data, tmp_path / "run", "--resume", "latest", **settings).status == 0
    assert_same_curve(losses(tmp_path / "run"), losses(tmp_path / "alone"), 1e-4)
    for name in REGULARISED:
        without = {each: value for each, value in settings.items() if each != name}
        assert ranks.train(1, small_data, tmp_path / name, **without).status == 0
        assert losses(tmp_path / name) != losses(tmp_path / "alone"), name
