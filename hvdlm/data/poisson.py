"""Poisson sampling: each sequence, or document, is in a batch with the same chance, whatever else is in it.

Unlike those of a shuffled epoch, such batches have no fixed size, and some may be empty. It is what the accounting of
differential privacy assumes (Abadi et al., "Deep Learning with Differential Privacy", CCS 2016).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hvdlm.data.shard import Split

Integers = npt.NDArray[np.int64]
Unit = Literal["sequence", "document"]


class Excerpts(NamedTuple):
    """What the sequences of a batch are read from: (B,) arrays."""

    shards: Integers
    starts: Integers  # their first tokens in these shards
    counts: Integers  # of tokens
    after_end: npt.NDArray[np.bool_]  # whether an end of text goes before them


@dataclass(frozen=True)
class PoissonBatches:
    """How many, and which, units each batch has: a pure function of `key` and the number of the batch."""

    key: str
    unit: Unit
    units: int
    """Of the training split."""
    expected: int
    """Of a batch, at most `units`."""
    fixed_parts: bool = False
    """Whether a unit is always in the part of one rank, so that no other part depends on it; or parts are equal."""

    @property
    def rate(self) -> float:
        """The chance of each unit to be in a batch."""
        return self.expected / self.units

    def size(self, batch: int) -> int:
        """Units of a batch."""
        return len(self.drawn(batch))

    def drawn(self, batch: int) -> Integers:
        """Their numbers, in order: (B,) int64."""
        return _drawn(self.key, self.units, self.expected, batch)

    def part(self, batch: int, place: int, ranks: int) -> range:
        """With `fixed_parts`, the indices in a batch of the rank in that place."""
        bounds = [each * self.units // ranks for each in (place, place + 1)]
        return range(*np.searchsorted(self.drawn(batch), bounds).tolist())


@lru_cache(maxsize=64)
def _drawn(key: str, units: int, expected: int, batch: int) -> Integers:
    """The gaps between units that are drawn have a geometric distribution."""
    if expected == units:
        return np.arange(units)
    for count in _growing(expected):
        uniform = (_words(f"{key} batch {batch}", count) >> np.uint64(11)).astype(np.float64)
        gaps = np.log((uniform + 1) / 2.0**53) / math.log1p(-expected / units)
        numbers = np.cumsum(np.minimum(gaps, units).astype(np.int64) + 1) - 1
        if numbers[-1] >= units:
            return numbers[: np.searchsorted(numbers, units)]
    raise AssertionError


def _growing(expected: int) -> Iterator[int]:
    """Numbers of gaps, of which the first is hardly ever too small."""
    count = expected + 6 * math.isqrt(expected) + 8
    while True:
        yield count
        count *= 2


def _words(name: str, count: int) -> npt.NDArray[np.uint64]:
    """The first of an endless succession of independent 64-bit words, which `name` selects."""
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(8 * count), dtype="<u8").astype(np.uint64)


class PoissonSampler:
    """From which tokens the units of each batch are read.

    A document is a sequence of its own, with an end of text before it. Of one that is longer than the context, one part
    is drawn each time.
    """

    def __init__(self, split: Split, context_length: int, batches: PoissonBatches) -> None:
        """Raises HvdlmError if the bounds of documents are needed and cannot be read."""
        self._batches, self._length = batches, context_length
        self._by_document = batches.unit == "document"
        if self._by_document:
            offsets = [split.document_offsets(shard).astype(np.int64) for shard in range(len(split.shards))]
            starts = [each[:-1] for each in offsets]
            self._tokens = np.concatenate([np.diff(each) for each in offsets])  # of each document
            self._shards = np.repeat(np.arange(len(starts)), [len(each) for each in starts])
        else:
            starts = [np.arange(sequences_of(each.n_tokens, context_length)) * context_length for each in split.shards]
            self._shards = np.repeat(np.arange(len(starts)), [len(each) for each in starts])
            self._tokens = np.full(len(self._shards), context_length + 1)
        self._starts = np.concatenate(starts)
        assert len(self._starts) == batches.units

    def excerpts(self, batch: int) -> Excerpts:
        """Of the units of a batch, in their order."""
        drawn = self._batches.drawn(batch)
        shards, starts, tokens = self._shards[drawn], self._starts[drawn], self._tokens[drawn]
        if not self._by_document:
            return Excerpts(shards, starts, tokens, np.zeros(len(drawn), dtype=np.bool_))
        length = self._length
        parts = np.maximum(-(-tokens // length), 1)  # each target is in one of them
        words = _words(f"{self._batches.key} part {batch}", len(drawn))
        part = (words % parts.astype(np.uint64)).astype(np.int64)
        is_first = part == 0
        starts = starts + part * length - ~is_first  # the input of a part's first target is the token before it
        counts = np.minimum(tokens - part * length, length) + ~is_first
        return Excerpts(shards, starts, counts, is_first)


def units_of(split: Split, context_length: int, unit: Unit) -> int:
    """How many there are in a training split."""
    if unit == "document":
        return sum(shard.n_docs for shard in split.shards)
    return sum(sequences_of(shard.n_tokens, context_length) for shard in split.shards)


def sequences_of(tokens: int, context_length: int) -> int:
    """Whole sequences of a shard of so many tokens, each of which needs the token after it as a target."""
    return max(tokens - 1, 0) // context_length
