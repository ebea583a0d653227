"""Which windows make up global batch k: a pure function of the data set's fingerprint, the seed and k."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hvdlm.errors import HvdlmError

ROUNDS = 8  # of the Feistel network; 4 are enough for a random function (Luby & Rackoff 1988), ours is only a mixer

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def part(batch_size: int, rank: int, size: int) -> range:
    """The places of a batch that fall to `rank` of `size`: contiguous, as equal as can be, maybe none."""
    return range(rank * batch_size // size, (rank + 1) * batch_size // size)


class Sampler:
    """The sample order of a training split.

    The shards are dealt into lanes, as many as divide both the batch and the shards. A lane has its own shards and
    its own places in every batch, and walks its windows in one pseudo-random permutation after another. So when the
    number of ranks divides the lanes, a rank reads its own shards and no other; yet the order itself knows no ranks.
    """

    def __init__(self, windows: Sequence[int], batch_size: int, seed: int, fingerprint: str) -> None:
        """`windows[s]` is the number of windows in shard s.

        Raises HvdlmError if a lane has no window at all.
        """
        self._lanes = math.gcd(batch_size, len(windows))
        self._places = batch_size // self._lanes  # in a batch, of each lane
        self._key = f"{fingerprint} {seed}"
        self._shard_ends = np.cumsum(windows, dtype=np.int64)  # (S,)
        shards = len(windows) // self._lanes
        lane_ends = self._shard_ends[shards - 1 :: shards]  # (lanes,)
        self._lane_starts = np.concatenate([np.zeros(1, dtype=np.int64), lane_ends[:-1]])
        self._lane_windows = lane_ends - self._lane_starts
        if not self._lane_windows.all():
            lane = int(np.argmin(self._lane_windows))
            raise HvdlmError(
                f"training shards {lane * shards} to {(lane + 1) * shards - 1} hold no whole sequence; "
                "shorten model.context_length, or prepare the data set with more text or fewer --shards"
            )

    def batch(self, k: int) -> tuple[Integers, Integers]:
        """Shard and window of each sequence of global batch `k`: two (batch_size,) int64 arrays."""
        lanes = np.repeat(np.arange(self._lanes), self._places)  # (B,)
        counters = k * self._places + np.tile(np.arange(self._places), self._lanes)  # (B,): windows drawn before
        sizes = self._lane_windows[lanes]
        epochs, places = np.divmod(counters, sizes)
        keys = np.stack(
            [_round_keys(self._key, lane, epoch) for lane, epoch in zip(lanes.tolist(), epochs.tolist(), strict=True)]
        )
        windows = self._lane_starts[lanes] + permute(places, sizes, keys)  # numbered through all shards
        shards = np.searchsorted(self._shard_ends, windows, side="right")
        return shards, windows - np.concatenate([np.zeros(1, dtype=np.int64), self._shard_ends])[shards]


def permute(values: Integers, sizes: Integers, keys: Words) -> Integers:
    """Each value, at least 0 and below its size, under the pseudo-random permutation of that range that its key names.

    The generalized Feistel network with cycle walking of Black & Rogaway, "Ciphers with Arbitrary Finite Domains"
    (CT-RSA 2002), section 5: a number below left * right is a pair of digits; each round adds a function of one
    digit to the other; results beyond the range go through again. Nothing is stored, so any value costs the same.

    Args:
        values, sizes: (n,) int64.
        keys: (n, ROUNDS) uint64.
    """
    domain = sizes.astype(np.uint64)
    left = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    right = -(-sizes // left.astype(np.int64))
    return _walk(values.astype(np.uint64), domain, left, right.astype(np.uint64), keys).astype(np.int64)


def _walk(values: Words, domain: Words, left: Words, right: Words, keys: Words) -> Words:
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


@lru_cache(maxsize=4096)
def _round_keys(key: str, lane: int, epoch: int) -> Words:
    """(ROUNDS,) independent words for one epoch of one lane."""
    digest = hashlib.shake_256(f"{key} {lane} {epoch}".encode()).digest(8 * ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
