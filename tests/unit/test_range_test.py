"""Rates of a range test, and what is advised from its losses."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hvdlm.config import OptimizerSection
from hvdlm.report.range_test import advice, smoothed_losses
from hvdlm.training.schedule import learning_rate


def test_the_rate_rises_by_one_factor_to_the_last_step() -> None:
    settings = OptimizerSection(schedule="range_test", lr=2.0, warmup_steps=7)
    rates = [learning_rate(step, 11, settings) for step in range(11)]
    assert rates[-1] == 2.0
    assert [b / a for a, b in pairwise(rates)] == pytest.approx([1e5 ** (1 / 11)] * 10)


def test_smoothing_is_a_weighted_mean() -> None:
    records = [{"lr": 1.0, "loss": 4.0}, {"lr": 2.0, "loss": None}, {"lr": 3.0, "loss": 2.0}, {"lr": 4.0, "loss": 1.0}]
    second = (0.9 * 4 + 2) / 1.9
    third = (0.81 * 4 + 0.9 * 2 + 1) / 2.71
    rates, losses = zip(*smoothed_losses(records), strict=True)
    assert rates == (1.0, 3.0, 4.0)
    assert losses == pytest.approx([4.0, second, third])


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([5.0, 4.0, 3.0, 9.0], "The loss is least, 3.9299, at 0.03: begin with optimizer.lr = 0.003."),
        ([5.0, 4.0, 3.0, 2.0], "The loss still falls at 0.3, the highest rate: raise optimizer.lr."),
        ([5.0, 4.0, 3.0, None], "The loss is least, 3.9299, at 0.03: begin with optimizer.lr = 0.003."),  # diverged
        ([None, None, None, None], "No loss was finite."),
    ],
)
def test_advice(losses: list[float | None], expected: str) -> None:
    # (0.81 * 5 + 0.9 * 4 + 3) / 2.71 = 3.9299
    rates = (3e-4, 3e-3, 3e-2, 3e-1)
    records = [{"step": step, "lr": rates[step], "loss": loss} for step, loss in enumerate(losses)]
    assert advice(records) == expected


def test_steps_that_are_missing_are_told() -> None:
    records = [{"step": step, "lr": 0.1 * step, "loss": 1.0} for step in (10, 20)]
    assert advice(records) == "Steps are missing: set log.every = 1."
