"""The learning rate: exact values at the places that matter, worked out by hand."""

from __future__ import annotations

import math

import pytest

from hvdlm.config import OptimizerSection
from hvdlm.training.schedule import learning_rate


def settings(**values: object) -> OptimizerSection:
    return OptimizerSection.model_validate({"lr": 2.0, "final_lr_ratio": 0.1, **values})


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "inverse_sqrt"])
def test_warm_up_rises_linearly_to_the_peak_on_its_last_step(schedule: str) -> None:
    rates = [learning_rate(step, 100, settings(schedule=schedule, warmup_steps=4)) for step in range(4)]
    assert rates == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (10, 1.1 + 0.9 * math.cos(math.pi / 80)),  # the first of the 80 steps along half a cosine
        (29, 1.1 + 0.9 * math.sqrt(0.5)),  # a quarter of the way: cos(pi / 4)
        (49, 1.1),  # half: cos(pi / 2) = 0
        (69, 1.1 - 0.9 * math.sqrt(0.5)),
        (89, 0.2),  # the last step
    ],
)
def test_cosine(step: int, expected: float) -> None:
    assert learning_rate(step, 90, settings(warmup_steps=10)) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("decay_steps", "step", "expected"),
    [
        # Of 100 steps the last fifth decays: 20 equal falls of 1.8 / 20 = 0.09.
        (0, 10, 2.0),
        (0, 45, 2.0),
        (0, 79, 2.0),
        (0, 80, 1.91),
        (0, 89, 1.1),
        (0, 99, 0.2),
        # 4 falls of 0.45
        (4, 95, 2.0),
        (4, 96, 1.55),
        (4, 97, 1.1),
        (4, 98, 0.65),
        (4, 99, 0.2),
        # the decay begins right after the warm-up: 90 falls of 0.02
        (90, 9, 2.0),
        (90, 10, 1.98),
        (90, 99, 0.2),
    ],
)
def test_wsd(decay_steps: int, step: int, expected: float) -> None:
    rate = learning_rate(step, 100, settings(schedule="wsd", warmup_steps=10, decay_steps=decay_steps))
    assert rate == pytest.approx(expected, rel=1e-14)


def test_without_warm_up_the_first_step_is_the_first_of_the_fall() -> None:
    assert learning_rate(0, 2, settings(warmup_steps=0)) == pytest.approx(1.1)  # cos(pi / 2)
    assert learning_rate(1, 2, settings(warmup_steps=0)) == pytest.approx(0.2)
    assert learning_rate(0, 10, settings(schedule="wsd", warmup_steps=0)) == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
def test_a_run_of_one_step(schedule: str) -> None:
    assert learning_rate(0, 1, settings(schedule=schedule, warmup_steps=0)) == pytest.approx(0.2)  # first and last
    assert learning_rate(0, 1, settings(schedule=schedule, warmup_steps=1)) == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_that_is_all_warm_up_ends_at_the_peak(schedule: str) -> None:
    assert learning_rate(9, 10, settings(schedule=schedule, warmup_steps=10)) == 2.0


def test_wsd_s_own_decay_gives_way_to_the_warm_up() -> None:
    rates = [learning_rate(step, 10, settings(schedule="wsd", warmup_steps=9)) for step in range(10)]
    assert rates[8:] == pytest.approx([2.0, 0.2])  # a fifth would be 2 steps, but only 1 is left


@pytest.mark.parametrize(("schedule", "ratio", "last"), [("cosine", 0.0, 0.0), ("wsd", 0.0, 0.0), ("cosine", 1.0, 2.0)])
def test_the_last_rate_is_the_ratio_of_the_peak(schedule: str, ratio: float, last: float) -> None:
    rate = learning_rate(49, 50, settings(schedule=schedule, warmup_steps=5, final_lr_ratio=ratio))
    assert rate == pytest.approx(last, abs=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear"])
def test_it_never_rises_after_the_warm_up(schedule: str) -> None:
    rates = [learning_rate(step, 200, settings(schedule=schedule, warmup_steps=20)) for step in range(20, 200)]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) == pytest.approx(0.2)


@pytest.mark.parametrize(("step", "expected"), [(10, 1.98), (54, 1.1), (99, 0.2)])  # 90 falls of 1.8 / 90 = 0.02
def test_linear(step: int, expected: float) -> None:
    rate = learning_rate(step, 100, settings(schedule="linear", warmup_steps=10))
    assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("warmup", "step", "expected"),
    [
        (4, 3, 2.0),  # the peak, and the first of the fall: sqrt(4 / 4)
        (4, 15, 1.0),  # sqrt(4 / 16)
        (4, 63, 0.5),  # sqrt(4 / 64)
        (4, 1599, 0.2),  # sqrt(4 / 1600) would be a twentieth of the peak
        (0, 0, 2.0),
        (0, 24, 0.4),  # sqrt(1 / 25)
    ],
)
def test_inverse_sqrt(warmup: int, step: int, expected: float) -> None:
    rates = [
        learning_rate(step, steps, settings(schedule="inverse_sqrt", warmup_steps=warmup)) for steps in (2000, 10000)
    ]
    assert rates == pytest.approx([expected, expected], rel=1e-12)
