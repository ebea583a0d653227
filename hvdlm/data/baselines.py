"""Cross-entropy of unigram and bigram models of a data set: baselines that a trained model must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdlm.data.shard import DataSet, Split
from hvdlm.errors import HvdlmError

DISCOUNT = 0.75
DENSE_VOCABULARY = 2048  # up to this size, a count for every possible pair fits in 32 MiB

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NgramBaselines:
    """Cross-entropies on the validation split, in nats per predicted token (all but the first of each shard)."""

    unigram: float
    bigram: float


def ngram_baselines(data: DataSet) -> NgramBaselines:
    """Fits both models on the training split and scores them on the validation split.

    Shards are read in blocks; memory holds only the counts, one for each distinct pair of the training split.

    Raises HvdlmError if the validation split has no tokens to predict.
    """
    predicted = sum(shard.n_tokens - 1 for shard in data.validation.shards)
    if not predicted:
        raise HvdlmError(f"{data.path} has no validation tokens; prepare it with a larger --validation")
    model = NgramModel.fit(data.train, data.vocab_size)
    unigram = bigram = 0.0
    for shard in range(len(data.validation.shards)):
        for block in data.validation.blocks(shard, overlap=1):
            tokens = block.astype(np.int64)
            unigram -= float(np.log(model.unigram(tokens[1:])).sum())
            bigram -= float(np.log(model.bigram(tokens[:-1], tokens[1:])).sum())
    return NgramBaselines(unigram / predicted, bigram / predicted)


class NgramModel:
    """Unigram with add-one smoothing; bigram by interpolated absolute discounting.

    Ney, Essen & Kneser, "On structuring probabilistic dependences in stochastic language modelling" (1994), in the
    form of Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 2.6:

        p(b | a) = max(c(ab) - D, 0) / c(a) + D N(a) / c(a) p(b)

    where c(a) is the number of pairs that begin with a, and N(a) the number of distinct ones among them. Where c(a)
    is 0, p(b | a) is p(b).
    """

    def __init__(self, tokens: Integers, codes: Integers, counts: Integers) -> None:
        """Makes the model from counts.

        Args:
            tokens: (V,), count of each token.
            codes: (P,), the distinct pairs ab that occur, each coded as a * V + b, in ascending order.
            counts: (P,), count of each of these pairs.
        """
        self._vocab_size = len(tokens)
        self._probability: Floats = (tokens + 1) / (tokens.sum() + self._vocab_size)
        self._codes = codes
        self._counts = counts
        first = codes // self._vocab_size
        self._pairs_from = np.bincount(first, weights=counts, minlength=self._vocab_size)
        self._distinct_from = np.bincount(first, minlength=self._vocab_size)

    @classmethod
    def fit(cls, split: Split, vocab_size: int) -> NgramModel:
        """Counts the tokens and the pairs of a split; no pair spans two shards."""
        tokens = np.zeros(vocab_size, dtype=np.int64)
        pairs = _DensePairCounts(vocab_size) if vocab_size <= DENSE_VOCABULARY else _SparsePairCounts()
        for shard in range(len(split.shards)):
            for number, block in enumerate(split.blocks(shard, overlap=1)):
                tokens += np.bincount(block[1:] if number else block, minlength=vocab_size)
                pairs.add(block[:-1].astype(np.int64) * vocab_size + block[1:])
        return cls(tokens, *pairs.codes_and_counts())

    def unigram(self, tokens: Integers) -> Floats:
        """Probability of each token."""
        return self._probability[tokens]

    def bigram(self, before: Integers, tokens: Integers) -> Floats:
        """Probability of each token after the one before it."""
        codes = before * self._vocab_size + tokens
        indices = np.searchsorted(self._codes, codes)
        indices[indices == len(self._codes)] = 0
        seen: Any = self._counts[indices] * (self._codes[indices] == codes) if len(self._codes) else 0
        pairs = self._pairs_from[before]
        unigram = self.unigram(tokens)
        with np.errstate(invalid="ignore", divide="ignore"):
            discounted = np.maximum(seen - DISCOUNT, 0) / pairs
            reserved = DISCOUNT * self._distinct_from[before] / pairs
        return np.where(pairs > 0, discounted + reserved * unigram, unigram)


class _DensePairCounts:
    """Counts pairs in an array with an entry for every possible pair."""

    def __init__(self, vocab_size: int) -> None:
        self._counts = np.zeros(vocab_size**2, dtype=np.int64)

    def add(self, codes: Integers) -> None:
        self._counts += np.bincount(codes, minlength=len(self._counts))

    def codes_and_counts(self) -> tuple[Integers, Integers]:
        codes = np.flatnonzero(self._counts)
        return codes, self._counts[codes]


class _SparsePairCounts:
    """Counts pairs in sorted arrays of the distinct pairs seen so far."""

    def __init__(self) -> None:
        self._codes = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, codes: Integers) -> None:
        new, new_counts = np.unique(codes, return_counts=True)
        merged, indices = np.unique(np.concatenate([self._codes, new]), return_inverse=True)
        counts = np.zeros(len(merged), dtype=np.int64)
        np.add.at(counts, indices, np.concatenate([self._counts, new_counts]))
        self._codes, self._counts = merged, counts

    def codes_and_counts(self) -> tuple[Integers, Integers]:
        return self._codes, self._counts
