"""Shares of a batch: the integer optimum, by trying all, and by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from hvdlm.data.shares import seconds_of, shares_by_cost


@pytest.mark.parametrize(
    ("sequences", "costs", "expected"),
    [
        (16, (1, 1), (8, 8)),
        (16, (1, 2), (11, 5)),  # 11 and 10; 10 and 6 would take 12
        (16, (1, 4), (13, 3)),  # 13 and 12; 12 and 4 would take 16
        (3, (1, 100, 1), (1, 1, 1)),  # each has one, by which it is measured
        (7, (5, 5, 5), (3, 2, 2)),
    ],
)
def test_by_hand(sequences: int, costs: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert shares_by_cost(sequences, costs) == expected


def test_no_other_shares_take_less() -> None:
    draw = random.Random(0)
    for _ in range(100):
        ranks, sequences = draw.randint(1, 4), draw.randint(4, 12)
        costs = tuple(draw.randint(1, 30) for _ in range(ranks))
        shares = shares_by_cost(sequences, costs)
        assert sum(shares) == sequences and min(shares) >= 1
        every = itertools.product(range(1, sequences + 1), repeat=ranks)
        best = min(max(a * b for a, b in zip(each, costs, strict=True)) for each in every if sum(each) == sequences)
        assert seconds_of(shares, costs) == best
