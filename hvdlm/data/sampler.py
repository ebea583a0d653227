"""The sample order: which windows make up global batch k, as a function of data set fingerprint, seed and k only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.data.mixture import Mixture
from hvdlm.errors import HvdlmError

# Of the Feistel network. 4 are enough with random round functions (Luby & Rackoff 1988); `_mix` is only a hash.
ROUNDS = 8

TOLERANCE = 0.05  # by which the largest group may have more windows than the smallest

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def rank_part(batch_size: int, rank: int, size: int) -> range:
    """The indices in a batch that `rank` of `size` ranks computes: contiguous, as equal as possible, maybe empty."""
    return range(rank * batch_size // size, (rank + 1) * batch_size // size)


class Sampler:
    """The sample order of a training split: each window once an epoch, in a new pseudo-random permutation each epoch.

    The shards are divided into groups of consecutive shards, and every batch into as many runs of consecutive
    indices; the number of groups is the greatest common divisor of all batch sizes and the number of shards. Each
    group fills its own run of every batch with its own windows.

    That draws windows in proportion only if all groups have as many. Where they differ by more than TOLERANCE, there
    is one permutation of all windows instead, and the windows of a batch are sorted, so that each part of a batch
    lies in few shards even so.

    The order does not depend on the number of ranks. If that number divides the number of groups, each rank reads
    only the shards of its own groups; without groups it reads mainly shards that no other rank reads.
    """

    def __init__(self, windows: Sequence[int], batch_sizes: BatchSizes, seed: int, fingerprint: str) -> None:
        """`windows[s]` is the number of windows in shard s.

        Raises HvdlmError if there is no window.
        """
        self._key = f"{fingerprint} {seed}"
        self._shard_ends = np.cumsum(windows, dtype=np.int64)  # (S,)
        if not sum(windows):
            raise HvdlmError(
                "the training shards hold no whole sequence; "
                "shorten model.context_length, or prepare the data set with more text or fewer --shards"
            )
        groups = math.gcd(batch_sizes.divisor, len(windows))
        shards = len(windows) // groups
        in_groups = np.asarray(windows, dtype=np.int64).reshape(groups, shards).sum(axis=1)  # (groups,)
        self._is_sorted = bool(in_groups.max() > (1 + TOLERANCE) * in_groups.min())
        self._groups = 1 if self._is_sorted else groups
        self._group_windows = in_groups.sum(keepdims=True) if self._is_sorted else in_groups
        self._group_starts = np.cumsum(self._group_windows) - self._group_windows
        self._batch_sizes = batch_sizes

    def batch(self, k: int) -> tuple[Integers, Integers]:
        """Shard and window of each sequence of global batch `k`, which has B: two (B,) int64 arrays."""
        sequences = self._batch_sizes.size(k) // self._groups  # of each group
        groups = np.repeat(np.arange(self._groups), sequences)  # (B,)
        # (B,): windows that each group has used before this sequence
        counters = self._batch_sizes.before(k) // self._groups + np.tile(np.arange(sequences), self._groups)
        sizes = self._group_windows[groups]
        epochs, positions = np.divmod(counters, sizes)
        keys = _keys(self._key, groups, epochs)
        windows = self._group_starts[groups] + permute(positions, sizes, keys)  # numbered across all shards
        if self._is_sorted:
            windows.sort()
        return _within_shards(windows, self._shard_ends)


class MixtureSampler:
    """The sample order of a training split of several sources, each with its share of every batch.

    A `Mixture` says from which source each sequence is drawn, so each has its share of all sequences so far, to within
    one. A source gives each of its windows once in an epoch of its own, in a new pseudo-random permutation each
    epoch. The windows that a batch has of a source are sorted, so that each part of the batch reads few of its shards.

    The order does not depend on the number of ranks, and every part of a batch is a mixture.
    """

    def __init__(
        self, windows: Sequence[Sequence[int]], mixture: Mixture, batch_sizes: BatchSizes, seed: int, fingerprint: str
    ) -> None:
        """`windows[s][i]` is the number of windows in shard i of source s of `mixture`; each source has some."""
        self._key = f"{fingerprint} {seed}"
        self._mixture, self._batch_sizes = mixture, batch_sizes
        self._shard_ends = np.cumsum([count for source in windows for count in source], dtype=np.int64)
        self._source_windows = np.array([sum(source) for source in windows], dtype=np.int64)
        self._source_starts = np.cumsum(self._source_windows) - self._source_windows

    def batch(self, k: int) -> tuple[Integers, Integers]:
        """Shard and window of each sequence of global batch `k`, which has B: two (B,) int64 arrays."""
        sources, drawn = self._mixture.sources(self._batch_sizes.before(k), self._batch_sizes.size(k))  # (B,)
        sizes = self._source_windows[sources]
        epochs, positions = np.divmod(drawn, sizes)
        windows = self._source_starts[sources] + permute(positions, sizes, _keys(self._key, sources, epochs))
        ordered = np.empty_like(windows)
        ordered[np.argsort(sources, kind="stable")] = np.sort(windows)  # those of source 0 have the lowest numbers
        return _within_shards(ordered, self._shard_ends)


def permute(values: Integers, sizes: Integers, keys: Words) -> Integers:
    """Applies to each value a pseudo-random permutation of range(size), selected by the value's keys.

    The generalized Feistel network with cycle walking of Black & Rogaway, "Ciphers with Arbitrary Finite Domains"
    (CT-RSA 2002), section 5: a number below left * right is a pair of digits; each round adds a function of one
    digit to the other; results outside the range are permuted again. No table is stored, so the cost of a value does
    not depend on the size.

    Args:
        values, sizes: (n,) int64; 0 <= value < size.
        keys: (n, ROUNDS) uint64.
    """
    domain = sizes.astype(np.uint64)
    left = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    right = -(-sizes // left.astype(np.int64))
    return _cycle_walk(values.astype(np.uint64), domain, left, right.astype(np.uint64), keys).astype(np.int64)


def _cycle_walk(values: Words, domain: Words, left: Words, right: Words, keys: Words) -> Words:
    values = _feistel(values, left, right, keys)
    outside = np.flatnonzero(values >= domain)
    while len(outside):
        values[outside] = _feistel(values[outside], left[outside], right[outside], keys[outside])
        outside = outside[values[outside] >= domain[outside]]
    return values


def _feistel(values: Words, left: Words, right: Words, keys: Words) -> Words:
    high, low = np.divmod(values, left)  # high < right, low < left
    for round_ in range(0, ROUNDS, 2):
        low = (low + _mix(high, keys[:, round_]) % left) % left
        high = (high + _mix(low, keys[:, round_ + 1]) % right) % right
    return high * left + low


def _mix(values: Words, keys: Words) -> Words:
    """64 bits that depend on all bits of value and key: the finalizer of SplitMix64 (Steele, Lea & Flood 2014)."""
    mixed: Words = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + keys
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _within_shards(windows: Integers, shard_ends: Integers) -> tuple[Integers, Integers]:
    """Shard and window in it of windows that are numbered across all shards."""
    shards = np.searchsorted(shard_ends, windows, side="right")
    return shards, windows - np.concatenate([np.zeros(1, dtype=np.int64), shard_ends])[shards]


def _keys(key: str, groups: Integers, epochs: Integers) -> Words:
    """(n, ROUNDS) uint64: keys for an epoch of a group each."""
    pairs = zip(groups.tolist(), epochs.tolist(), strict=True)
    return np.stack([_round_keys(key, group, epoch) for group, epoch in pairs])


@lru_cache(maxsize=4096)
def _round_keys(key: str, group: int, epoch: int) -> Words:
    """(ROUNDS,) uint64: independent keys for one epoch of one group."""
    digest = hashlib.shake_256(f"{key} {group} {epoch}".encode()).digest(8 * ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
