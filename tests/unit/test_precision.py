"""The loss scale of fp16."""

from __future__ import annotations

import json

import pytest

from hvdlm.training.precision import LossScale


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_are_not_scaled_whatever_happens(precision: str) -> None:
    scale = LossScale(precision)  # type: ignore[arg-type]
    assert not scale.is_dynamic
    for overflowed in [True] * 3 + [False] * 2500:
        scale.update(overflowed)
    assert scale.factor == 1.0


def test_an_overflow_halves_the_scale() -> None:
    scale = LossScale("fp16")
    assert scale.is_dynamic
    assert scale.factor == 65536.0
    factors = []
    for _ in range(3):
        scale.update(overflowed=True)
        factors.append(scale.factor)
    assert factors == [32768.0, 16384.0, 8192.0]


def test_the_scale_does_not_fall_below_1() -> None:
    scale = LossScale("fp16")
    for _ in range(16):
        scale.update(overflowed=True)
    assert scale.factor == 1.0
    scale.update(overflowed=True)
    assert scale.factor == 1.0


def test_a_thousand_good_steps_double_the_scale() -> None:
    scale = LossScale("fp16")
    for _ in range(999):
        scale.update(overflowed=False)
    assert scale.factor == 65536.0
    scale.update(overflowed=False)
    assert scale.factor == 131072.0
    for _ in range(1000):
        scale.update(overflowed=False)
    assert scale.factor == 262144.0


def test_an_overflow_starts_the_count_of_good_steps_anew() -> None:
    scale = LossScale("fp16")
    for _ in range(999):
        scale.update(overflowed=False)
    scale.update(overflowed=True)
    for _ in range(999):
        scale.update(overflowed=False)
    assert scale.factor == 32768.0
    scale.update(overflowed=False)
    assert scale.factor == 65536.0


def test_the_state_goes_through_json_and_continues_where_it_was() -> None:
    scale = LossScale("fp16")
    scale.update(overflowed=True)
    for _ in range(998):
        scale.update(overflowed=False)
    again = LossScale("fp16")
    again.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    assert again.factor == 32768.0
    again.update(overflowed=False)
    assert again.factor == 32768.0
    again.update(overflowed=False)
    assert again.factor == 65536.0
