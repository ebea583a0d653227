"""What a model must beat: the cross-entropy of counting single tokens and pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdlm.data.shard import DataSet, Split
from hvdlm.errors import HvdlmError

DISCOUNT = 0.75
DENSE_VOCABULARY = 2048  # up to here a count for every possible pair takes at most 32 MiB

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Yardsticks:
    """Cross-entropies on the validation split, in nats per predicted token (all but the first of each shard)."""

    unigram: float
    bigram: float


def yardsticks(data: DataSet) -> Yardsticks:
    """Fits both models on the training split and scores them on the validation split.

    Shards are streamed; memory holds the counts, of pairs as many as are distinct in the training split.

    Raises HvdlmError if there is nothing to score.
    """
    predicted = sum(shard.n_tokens - 1 for shard in data.validation.shards)
    if not predicted:
        raise HvdlmError(f"{data.path} has no validation tokens; prepare it with a larger --validation")
    model = CountModel.fit(data.train, data.vocab_size)
    unigram = bigram = 0.0
    for shard in range(len(data.validation.shards)):
        for block in data.validation.blocks(shard, overlap=1):
            tokens = block.astype(np.int64)
            unigram -= float(np.log(model.unigram(tokens[1:])).sum())
            bigram -= float(np.log(model.bigram(tokens[:-1], tokens[1:])).sum())
    return Yardsticks(unigram / predicted, bigram / predicted)


class CountModel:
    """Unigram with add-one smoothing; bigram by interpolated absolute discounting.

    Ney, Essen & Kneser, "On structuring probabilistic dependences in stochastic language modelling" (1994), in the
    form of Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 2.6:

        p(b | a) = max(c(ab) - D, 0) / c(a) + D N(a) / c(a) p(b)

    with c(a) the pairs that begin with a, N(a) the distinct ones among them, and p(b) where c(a) is 0.
    """

    def __init__(self, tokens: Integers, codes: Integers, counts: Integers) -> None:
        """From the count of each token (V,), and of each pair ab that occurs, coded as aV + b and sorted."""
        self._vocab_size = len(tokens)
        self._probability: Floats = (tokens + 1) / (tokens.sum() + self._vocab_size)
        self._codes = codes
        self._counts = counts
        first = codes // self._vocab_size
        self._pairs = np.bincount(first, weights=counts, minlength=self._vocab_size)
        self._distinct = np.bincount(first, minlength=self._vocab_size)

    @classmethod
    def fit(cls, split: Split, vocab_size: int) -> CountModel:
        """Counts the tokens and the pairs of a split; pairs do not cross the bounds of shards."""
        tokens = np.zeros(vocab_size, dtype=np.int64)
        pairs = _DensePairs(vocab_size) if vocab_size <= DENSE_VOCABULARY else _SparsePairs()
        for shard in range(len(split.shards)):
            for number, block in enumerate(split.blocks(shard, overlap=1)):
                tokens += np.bincount(block[1:] if number else block, minlength=vocab_size)
                pairs.add(block[:-1].astype(np.int64) * vocab_size + block[1:])
        return cls(tokens, *pairs.counted())

    def unigram(self, tokens: Integers) -> Floats:
        """Probability of each token."""
        return self._probability[tokens]

    def bigram(self, before: Integers, tokens: Integers) -> Floats:
        """Probability of each token after the one before it."""
        codes = before * self._vocab_size + tokens
        places = np.searchsorted(self._codes, codes)
        places[places == len(self._codes)] = 0
        seen: Any = self._counts[places] * (self._codes[places] == codes) if len(self._codes) else 0
        pairs = self._pairs[before]
        backed_off = self.unigram(tokens)
        with np.errstate(invalid="ignore", divide="ignore"):
            discounted = np.maximum(seen - DISCOUNT, 0) / pairs
            reserved = DISCOUNT * self._distinct[before] / pairs
        return np.where(pairs > 0, discounted + reserved * backed_off, backed_off)


class _DensePairs:
    def __init__(self, vocab_size: int) -> None:
        self._counts = np.zeros(vocab_size**2, dtype=np.int64)

    def add(self, codes: Integers) -> None:
        self._counts += np.bincount(codes, minlength=len(self._counts))

    def counted(self) -> tuple[Integers, Integers]:
        codes = np.flatnonzero(self._counts)
        return codes, self._counts[codes]


class _SparsePairs:
    def __init__(self) -> None:
        self._codes = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, codes: Integers) -> None:
        new, new_counts = np.unique(codes, return_counts=True)
        merged, places = np.unique(np.concatenate([self._codes, new]), return_inverse=True)
        counts = np.zeros(len(merged), dtype=np.int64)
        np.add.at(counts, places, np.concatenate([self._counts, new_counts]))
        self._codes, self._counts = merged, counts

    def counted(self) -> tuple[Integers, Integers]:
        return self._codes, self._counts
