"""The sample order: a function of fingerprint, seed and batch number only, the same for any number of ranks."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest

from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.data.sampler import ROUNDS, Sampler, permute, rank_part
from hvdlm.errors import HvdlmError

WINDOWS = [5, 1, 7, 3, 4, 9]
NEARLY_EQUAL = [40, 41, 40, 42, 41, 40]
MASK = 2**64 - 1


def pairs(sampler: Sampler, k: int) -> list[tuple[int, int]]:
    shards, windows = sampler.batch(k)
    return list(zip(shards.tolist(), windows.tolist(), strict=True))


def reference(windows: list[int], batch_size: int, seed: int, fingerprint: str, k: int) -> list[tuple[int, int]]:
    """An independent implementation: one sequence at a time, with Python integers and a swapping Feistel network."""
    groups = math.gcd(batch_size, len(windows))
    sizes = [sum(windows[i : i + len(windows) // groups]) for i in range(0, len(windows), len(windows) // groups)]
    unequal = max(sizes) > 1.05 * min(sizes)
    groups = 1 if unequal else groups
    shards, sequences = len(windows) // groups, batch_size // groups
    batch = []
    for group in range(groups):
        own = [(s, w) for s in range(group * shards, (group + 1) * shards) for w in range(windows[s])]
        for sequence in range(sequences):
            epoch, value = divmod(k * sequences + sequence, len(own))
            digest = hashlib.shake_256(f"{fingerprint} {seed} {group} {epoch}".encode()).digest(8 * ROUNDS)
            keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]
            a = math.isqrt(len(own) - 1) + 1
            b = -(-len(own) // a)
            value = network(value, a, b, keys)
            while value >= len(own):
                value = network(value, a, b, keys)
            batch.append(own[value])
    return sorted(batch) if unequal else batch


def network(value: int, a: int, b: int, keys: list[int]) -> int:
    left, right = value % a, value // a
    for number, key in enumerate(keys):
        left, right = right, (left + mix(right, key)) % (b if number % 2 else a)
    return right * a + left


def mix(value: int, key: int) -> int:
    value = ((value + 1) * 0x9E3779B97F4A7C15 + key) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@pytest.mark.parametrize("windows", [WINDOWS, NEARLY_EQUAL])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 6, 9, 12])
@pytest.mark.parametrize("k", [0, 1, 17, 10**9])
def test_agrees_with_an_independent_implementation(windows: list[int], batch_size: int, k: int) -> None:
    assert pairs(Sampler(windows, BatchSizes(batch_size), 3, "f"), k) == reference(windows, batch_size, 3, "f", k)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 7, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_parts_make_up_the_batch(batch_size: int, size: int) -> None:
    parts = [rank_part(batch_size, rank, size) for rank in range(size)]
    assert [index for own in parts for index in own] == list(range(batch_size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_ranks_than_sequences_leaves_empty_parts() -> None:
    assert [len(rank_part(2, rank, 5)) for rank in range(5)] == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_rank_reads_only_its_own_shards(size: int) -> None:
    sampler = Sampler(NEARLY_EQUAL, BatchSizes(12), 0, "f")
    for rank in range(size):
        own = {shard for k in range(40) for shard, _ in np.array(pairs(sampler, k))[list(rank_part(12, rank, size))]}
        assert own == set(range(rank * 6 // size, (rank + 1) * 6 // size))


def test_each_epoch_of_a_group_contains_each_window_once() -> None:
    # Batches of 4 over 6 shards make 2 groups of 3 shards, with 121 and 123 windows; each gives 2 sequences to a batch.
    sampler = Sampler(NEARLY_EQUAL, BatchSizes(4), 0, "f")
    batches = [pairs(sampler, k) for k in range(3 * 123)]
    for group, shards in ((0, (0, 1, 2)), (1, (3, 4, 5))):
        windows = {(shard, window) for shard in shards for window in range(NEARLY_EQUAL[shard])}
        order = [pair for batch in batches for pair in batch[2 * group : 2 * group + 2]]
        epochs = [order[i : i + len(windows)] for i in range(0, len(order) - len(windows) + 1, len(windows))]
        assert len(epochs) >= 5
        assert all(Counter(epoch) == Counter(windows) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("windows", [WINDOWS, [0, 0, 5, 0], [3, 0, 0, 98]])
@pytest.mark.parametrize("batch_size", [4, 12])
def test_unequal_shards_give_each_window_once_an_epoch(windows: list[int], batch_size: int) -> None:
    sampler = Sampler(windows, BatchSizes(batch_size), 0, "f")
    drawn = Counter(pair for k in range(3 * sum(windows)) for pair in pairs(sampler, k))
    # `batch_size` times 3 times as many sequences as there are windows: so many whole epochs
    every = [(shard, window) for shard, count in enumerate(windows) for window in range(count)]
    assert drawn == Counter(dict.fromkeys(every, 3 * batch_size))


def test_shards_are_drawn_in_proportion() -> None:
    """200 batches of 8 from 8 shards of which one holds 98.9% of all windows."""
    sampler = Sampler([52, 42, 68, 73, 52, 36162, 63, 42], BatchSizes(8), 0, "f")
    drawn = [pair for k in range(200) for pair in pairs(sampler, k)]
    assert len(set(drawn)) == 1600
    # 17.2 expected of the other shards, with a standard deviation of 4.1
    assert 0 < sum(shard != 5 for shard, _ in drawn) < 17.2 + 4 * 4.1


def test_with_unequal_shards_ranks_read_mainly_different_ones() -> None:
    sampler = Sampler([100, 300, 200, 200, 100, 100, 500, 100], BatchSizes(64), 0, "f")
    # half of all windows are in the first four shards
    read = [[shard < 4 for shard, _ in np.array(pairs(sampler, k))[list(rank_part(64, 0, 2))]] for k in range(200)]
    # (order statistics) sqrt(64 / 4) * sqrt(2 / pi) / 2 = 1.6 of 32 lie beyond the middle on average
    assert 0.93 < np.mean(read) < 0.97


def test_order_depends_on_seed_and_fingerprint() -> None:
    orders = {
        tuple(pairs(Sampler([1000], BatchSizes(50), seed, fingerprint), 0))
        for seed in (0, 1)
        for fingerprint in ("f", "g")
    }
    assert len(orders) == 4


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10, 64, 1000])
def test_permutation_is_one_to_one(size: int) -> None:
    keys = np.broadcast_to(np.arange(ROUNDS, dtype=np.uint64), (size, ROUNDS))
    permuted = permute(np.arange(size), np.full(size, size), keys)
    assert sorted(permuted.tolist()) == list(range(size))


def test_permutation_of_a_huge_range_stays_in_it() -> None:
    size = 10**12 + 39
    values = np.array([0, 1, size // 2, size - 1])
    permuted = permute(values, np.full(4, size), np.zeros((4, ROUNDS), dtype=np.uint64))
    assert ((permuted >= 0) & (permuted < size)).all()
    assert len(set(permuted.tolist())) == 4


@pytest.mark.parametrize("size", [3, 10, 17])
def test_every_window_is_equally_likely_at_every_position(size: int) -> None:
    trials = 20_000
    keys = np.random.default_rng(0).integers(0, 2**64, (trials, ROUNDS), dtype=np.uint64)
    for position in (0, 1, size - 1):
        counts = np.bincount(permute(np.full(trials, position), np.full(trials, size), keys), minlength=size)
        chi_squared = float(((counts - trials / size) ** 2).sum() * size / trials)
        # Mean size - 1, variance 2 (size - 1); 5 standard deviations.
        assert chi_squared < size - 1 + 5 * math.sqrt(2 * (size - 1))


def test_neighbouring_windows_are_separated() -> None:
    order = np.array([window for k in range(20) for _, window in pairs(Sampler([1000], BatchSizes(50), 0, "f"), k)])
    # The mean distance of two random numbers below n is n / 3, with a standard error here of about 8.
    assert abs(np.abs(np.diff(order)).mean() - 1000 / 3) < 40


def test_too_little_data_says_what_to_change() -> None:
    with pytest.raises(HvdlmError, match=r"training shards hold no whole sequence; shorten model\.context_length"):
        Sampler([0, 0, 0, 0], BatchSizes(2), 0, "f")
