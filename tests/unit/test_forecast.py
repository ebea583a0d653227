"""Forecasts of when gradients arrive, against time lines drawn by hand; and what is chosen by them."""

from __future__ import annotations

import itertools
import random

import pytest

from hvdlm.gradients.auto.forecast import BackwardPass, Cost, choose_codecs, finish_time

# Two buckets, ready at 4 and 10, when the backward pass ends.
BACKWARD = BackwardPass([4.0, 10.0], 10.0)


@pytest.mark.parametrize(
    ("costs", "shares_core", "expected"),
    [
        # nothing to send
        ([Cost(0, 0), Cost(0, 0)], False, 10),
        # the first travels 4-7 behind the backward pass, the second 10-13 behind nothing
        ([Cost(0, 3), Cost(0, 3)], False, 13),
        # the first travels 4-12, the second waits for it and travels 12-15
        ([Cost(0, 8), Cost(0, 3)], False, 15),
        # on a core of its own the codec works 4-6 and 10-12
        ([Cost(2, 0), Cost(2, 0)], False, 12),
        # on the same core it works half of 4-8, in which the backward pass does 2 of its 6; that ends at 12, not 10
        ([Cost(2, 0), Cost(2, 0)], True, 14),
        # it works half of 4-16, in which the backward pass does its 6, and alone 16-18; the second bucket takes 1
        ([Cost(8, 0), Cost(1, 0)], True, 19),
    ],
)
def test_a_time_line(costs: list[Cost], shares_core: bool, expected: float) -> None:
    assert finish_time(BACKWARD, costs, shares_core) == expected


def test_what_wins_nothing_is_not_chosen() -> None:
    fast_link = {"none": [Cost(0, 0.05)] * 2, "fp16": [Cost(0.01, 0.02)] * 2}
    assert choose_codecs(BACKWARD, fast_link, False) == ["none", "none"]


def test_the_last_bucket_is_compressed_and_the_one_that_nobody_waits_for_is_not() -> None:
    costs = {"none": [Cost(0, 3)] * 2, "fp16": [Cost(0.1, 1.5)] * 2}
    assert choose_codecs(BACKWARD, costs, False) == ["none", "fp16"]


def test_on_a_slow_link_both_are() -> None:
    costs = {"none": [Cost(0, 30)] * 2, "fp16": [Cost(0.1, 15)] * 2, "topk": [Cost(1, 1)] * 2}
    assert choose_codecs(BACKWARD, costs, False) == ["topk", "topk"]


def test_a_codec_that_takes_the_core_from_the_backward_pass_pays_less() -> None:
    costs = {"none": [Cost(0, 1)] * 2, "topk": [Cost(0.9, 0)] * 2}
    assert choose_codecs(BACKWARD, costs, False) == ["none", "none"]  # by 0.1 of 11
    costs = {"none": [Cost(0, 8)] * 2, "topk": [Cost(5, 0)] * 2}
    assert finish_time(BACKWARD, costs["topk"], True) == 20
    assert choose_codecs(BACKWARD, costs, False) == ["topk", "topk"]
    assert choose_codecs(BACKWARD, costs, True) == ["none", "topk"]  # 17, and the other way round 23


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_is_much_better(seed: int) -> None:
    """All 81 choices tried one by one."""
    draw = random.Random(seed)
    ready = sorted(draw.uniform(0, 10) for _ in range(4))
    backward = BackwardPass(ready, ready[-1])
    costs = {name: [Cost(draw.uniform(0, 2), draw.uniform(0, 4)) for _ in range(4)] for name in ("none", "a", "b")}

    def finish(names: tuple[str, ...] | list[str]) -> float:
        return finish_time(backward, [costs[name][index] for index, name in enumerate(names)], True)

    best = min(map(finish, itertools.product(costs, repeat=4)))
    assert finish(choose_codecs(backward, costs, True)) <= best * 1.03
