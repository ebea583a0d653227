"""Global batches that grow: their sizes, and which sequences each has, worked out by hand."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

import pytest
from test_config import configure, refusal
from test_sampler import NEARLY_EQUAL, WINDOWS, pairs, reference

from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.data.rank_parts import RankParts
from hvdlm.data.sampler import Sampler

# Three increments in 7 batches: from batches 7/3, 14/3 and 7 on, up
RAMP = BatchSizes(16, increment=4, increments=3, steps=7)
SIZES = [4, 4, 4, 8, 8, 12, 12, 16, 16, 16]


def test_sizes_and_what_has_come_before() -> None:
    assert [RAMP.size(batch) for batch in range(10)] == SIZES
    assert [RAMP.before(batch) for batch in range(10)] == [0, 4, 8, 12, 20, 28, 40, 52, 68, 84]
    assert (RAMP.first, RAMP.divisor) == (4, 4)
    assert RAMP.size(10**9) == 16
    assert RAMP.before(10**9) == 52 + 16 * (10**9 - 7)


@pytest.mark.parametrize(("increments", "steps"), [(1, 1), (1, 5), (4, 4), (5, 23), (7, 9)])
def test_what_has_come_before_is_the_sum_of_all_sizes(increments: int, steps: int) -> None:
    sizes = BatchSizes(100, 3, increments, steps)
    each = [sizes.size(batch) for batch in range(40)]
    assert each[0] == 100 - 3 * increments
    assert each[steps - 1] < 100 == each[steps]
    assert each == sorted(each)
    counts = Counter(size for size in each if size < 100)
    assert len(counts) == increments
    assert max(counts.values()) - min(counts.values()) <= 1
    assert [sizes.before(batch) for batch in range(41)] == [0, *accumulate(each)]


def test_a_batch_that_does_not_grow() -> None:
    assert [BatchSizes(5).size(batch) for batch in (0, 1, 9)] == [5, 5, 5]
    assert [BatchSizes(5).before(batch) for batch in (0, 1, 9)] == [0, 5, 45]
    assert (BatchSizes(5).first, BatchSizes(5).divisor) == (5, 5)


def test_windows_of_groups_of_shards() -> None:
    """Sizes of 4, 8, 12 and 16 over 6 shards make 2 groups, as batches of 2 do. Each group goes on where it was."""
    order = [reference(NEARLY_EQUAL, 2, 3, "f", place) for place in range(84 // 2)]
    sampler, begin = Sampler(NEARLY_EQUAL, RAMP, 3, "f"), 0
    for batch, size in enumerate(SIZES[:-1]):
        own = order[begin : begin + size // 2]
        assert pairs(sampler, batch) == [first for first, _ in own] + [second for _, second in own]
        begin += size // 2


def test_windows_of_unequal_shards() -> None:
    """One permutation of all windows, of which batches are sorted; here three epochs of 29 windows."""
    order = [window for place in range(84) for window in reference(WINDOWS, 1, 3, "f", place)]
    sampler, begin = Sampler(WINDOWS, RAMP, 3, "f"), 0
    for batch, size in enumerate(SIZES[:-1]):
        assert pairs(sampler, batch) == sorted(order[begin : begin + size])
        begin += size


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])  # the last have some ranks without a sequence
def test_every_sequence_is_one_rank_s(ranks: int) -> None:
    """Also where a rank has died in the ramp, with what it has not sent of the batches before."""
    once = Counter((batch, index) for batch, size in enumerate(SIZES) for index in range(size))
    parts = RankParts(RAMP, ranks)
    all_of = [parts.own(batch, rank) for batch in range(len(SIZES)) for rank in range(ranks)]
    assert Counter(each for own in all_of for each in own) == once
    if ranks == 1:
        return
    left, lost = parts.regrouped(range(1, ranks), sent=2, batch=5, end=len(SIZES))
    assert lost == 0
    trained = [left.own(batch, rank) for batch in range(len(SIZES)) for rank in range(1, ranks)]
    trained += [parts.own(batch, 0) for batch in range(2)]
    assert Counter(each for own in trained for each in own) == once


def settings(start: int, increment: int, steps: int, *others: str) -> list[str]:
    ramp = {"start": start, "increment": increment, "steps": steps}
    return [f"--train.batch_ramp_{name}={value}" for name, value in ramp.items()] + list(others)


def test_of_settings() -> None:
    final = "--train.global_batch_size=16"
    assert configure(*settings(4, 4, 7, final)).train.batch_sizes == RAMP
    assert configure(*settings(4, 0, 7, final)).train.batch_sizes == RAMP  # by as many as it has at the start
    assert configure(*settings(0, 0, 0, final)).train.batch_sizes == BatchSizes(16)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (32, 1), (33, 2), (52 * 8, 7), (52 * 8 + 1, 8), (84 * 8, 9)])
def test_tokens_that_end_training_in_the_ramp_or_after_it(tokens: int, steps: int) -> None:
    words = settings(
        4, 4, 7, "--train.global_batch_size=16", "--model.context_length=8", f"--train.max_tokens={tokens}"
    )
    config = configure(*words, "--train.steps=50", "--optimizer.warmup_steps=0")
    assert config.planned_steps == steps
    assert config.tokens_before(9) == 84 * 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (settings(16, 4, 7), "train.batch_ramp_start = 16 is not less than train.global_batch_size = 16"),
        (settings(0, 4, 0), "train.batch_ramp_increment = 4 needs train.batch_ramp_start"),
        (settings(0, 0, 7), "train.batch_ramp_steps = 7 needs train.batch_ramp_start"),
        (settings(4, 5, 7), "set train.batch_ramp_increment to a divisor of 12"),
        (
            settings(3, 0, 7),
            "a batch that grows by 3 sequences at a time does not come from train.batch_ramp_start = 3",
        ),
        (settings(4, 4, 2), "train.batch_ramp_steps = 2 is less than the 3 times that the batch grows by 4 sequences"),
        (settings(4, 4, 0), "train.batch_ramp_steps = 0 is less than the 3 times that the batch grows by 4 sequences"),
    ],
)
def test_settings_that_do_not_fit(words: list[str], said: str) -> None:
    assert said in refusal(*words, "--train.global_batch_size=16")
