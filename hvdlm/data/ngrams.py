"""n-gram models of a data set, by interpolated Kneser-Ney smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvdlm.data.shard import Split

# Tokens that are counted at most: 5-grams of so many take some 2 GiB while they are counted.
MAX_TOKENS = 2**24

# Where there are too few n-grams to estimate discounts from
_USUAL_DISCOUNTS = (0.5, 1.0, 1.5)

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class KneserNey:
    """Models of order 1 to `order`, which share their counts.

    Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 3: modified
    Kneser-Ney smoothing, interpolated, with three discounts for each order:

        p(w | h) = max(c(hw) - D(c(hw)), 0) / c(h) + gamma(h) p(w | h'),
        gamma(h) = (D(1) N1(h) + D(2) N2(h) + D(3) N3(h)) / c(h)

    where h' is h without its first token, c(h) the sum of c(hw) over all w, and Nk(h) the number of w with c(hw) = k,
    of N3 with 3 or more. In a model's highest order c(hw) is how often hw occurs; in lower ones it is how many
    different tokens stand before hw. Below the unigram all tokens are equally likely. Where c(h) is 0, p(w | h) is
    p(w | h').
    """

    def __init__(self, shards: Sequence[Integers], vocab_size: int, order: int) -> None:
        """Counts the n-grams of `shards`, of which none spans two."""
        self.vocab_size, self.order = vocab_size, order
        tokens = np.concatenate([np.zeros(0, dtype=np.int64), *shards])
        # (N,): of the tokens before it in its shard
        before = np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(len(shard)) for shard in shards)])
        self._tables: list[_Table] = []
        ids = np.zeros(len(tokens), dtype=np.int64)  # of the n-gram that ends at each token, n = 0 at first
        for n in range(1, order + 1):
            ends = np.flatnonzero(before >= n - 1)
            codes, first, inverse, counts = np.unique(
                ids[ends - 1] * vocab_size + tokens[ends],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            if n > 1:
                # Each distinct n-gram is one more token before its last n - 1; the bounds of shards are another one
                shorter = self._tables[-1]
                distinct_before = np.bincount(ids[ends[first]], minlength=len(shorter.codes))
                distinct_before[np.unique(ids[before == n - 2])] += 1
                shorter.distinct_before = shorter.occurrences.with_counts(distinct_before)
            ids = np.full(len(tokens), -1, dtype=np.int64)
            ids[ends] = inverse
            n_contexts = len(self._tables[-1].codes) if self._tables else 1
            self._tables.append(_Table(codes, _Counts(counts, codes // vocab_size, n_contexts)))

    @classmethod
    def fit(cls, split: Split, vocab_size: int, order: int) -> KneserNey:
        """Counts up to MAX_TOKENS tokens of a split: as many of each shard, of which several may hold one source."""
        sizes = [record.n_tokens for record in split.shards]
        room, taken = MAX_TOKENS, [0] * len(sizes)
        for number, shard in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
            taken[shard] = min(sizes[shard], room // (len(sizes) - number))
            room -= taken[shard]
        shards = [split.read(shard, 0, size).astype(np.int64) for shard, size in enumerate(taken) if size]
        return cls(shards, vocab_size, order)

    def probabilities(self, tokens: Integers) -> Floats:
        """tokens: (T,) -> (order, T): of each token after those before it, by the model of each order."""
        found = np.empty((self.order, len(tokens)))
        lower = np.full(len(tokens), 1 / self.vocab_size)  # of the order below, by the numbers of tokens before
        contexts = np.zeros(len(tokens), dtype=np.int64)
        for n, table in enumerate(self._tables):
            codes = np.where(contexts >= 0, contexts * self.vocab_size + tokens, -1)
            ids = table.find(codes)
            found[n] = table.occurrences.interpolate(ids, contexts, lower)
            if table.distinct_before is not None:
                lower = table.distinct_before.interpolate(ids, contexts, lower)
            contexts = np.concatenate([np.full(min(1, len(ids)), -1), ids[:-1]])
        return found

    def distribution(self, before: Sequence[int]) -> Floats:
        """(V,): probabilities of the token that follows, by the model of the highest order."""
        probabilities = np.full(self.vocab_size, 1 / self.vocab_size)
        for n, table in enumerate(self._tables):
            context = self._find(list(before[len(before) - n :])) if len(before) >= n else -1
            counts = table.distinct_before or table.occurrences
            if context < 0:
                break
            ids = np.arange(*np.searchsorted(table.codes, [context * self.vocab_size, (context + 1) * self.vocab_size]))
            probabilities *= counts.gamma[context]
            if len(ids):
                seen = table.codes[ids] - context * self.vocab_size
                probabilities[seen] += counts.discounted(ids) / counts.totals[context]
        return probabilities

    def _find(self, tokens: Sequence[int]) -> int:
        """The id of an n-gram, -1 if it has not occurred."""
        found = 0
        for table, token in zip(self._tables, tokens, strict=False):
            found = int(table.find(np.array([found * self.vocab_size + token]))[0])
            if found < 0:
                break
        return found


@dataclass
class _Table:
    """The distinct n-grams of one order; the id of one is its index here."""

    codes: Integers  # id of the n-gram without its last token, times V, plus that token; ascending
    occurrences: _Counts
    distinct_before: _Counts | None = None  # None of the highest order

    def find(self, codes: Integers) -> Integers:
        """Ids; -1 of those that have not occurred."""
        if not len(self.codes):
            return np.full(len(codes), -1)
        indices = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        return np.where(self.codes[indices] == codes, indices, -1)


class _Counts:
    """c(hw) of every n-gram hw, and what follows from them for every h."""

    def __init__(self, counts: Integers, contexts: Integers, n_contexts: int) -> None:
        """`contexts`: the id of h of every n-gram, below `n_contexts`."""
        self._counts, self._contexts, self._n_contexts = counts, contexts, n_contexts
        self._discounts = _discounts(counts)
        self.totals: Floats = np.bincount(contexts, weights=counts, minlength=n_contexts).astype(np.float64)  # c(h)
        reserved = np.bincount(contexts, weights=self._discounts[np.minimum(counts, 3)], minlength=n_contexts)
        self.gamma: Floats = np.ones(n_contexts)  # 1 where c(h) is 0
        np.divide(reserved, self.totals, out=self.gamma, where=self.totals > 0)

    def with_counts(self, counts: Integers) -> _Counts:
        """The same n-grams, counted otherwise."""
        return _Counts(counts, self._contexts, self._n_contexts)

    def discounted(self, ids: Integers) -> Floats:
        """max(c(hw) - D(c(hw)), 0); 0 where an id is -1."""
        counts = np.append(self._counts, 0)[ids]
        discounted: Floats = np.maximum(counts - self._discounts[np.minimum(counts, 3)], 0)
        return discounted

    def interpolate(self, ids: Integers, contexts: Integers, lower: Floats) -> Floats:
        """Probabilities, from those of the order below; -1: an n-gram, or an h, that has not occurred."""
        known = np.flatnonzero(contexts >= 0)
        known = known[self.totals[contexts[known]] > 0]
        result = lower.copy()
        context = contexts[known]
        result[known] = self.discounted(ids[known]) / self.totals[context] + self.gamma[context] * lower[known]
        return result


def _discounts(counts: Integers) -> Floats:
    """D(0) = 0 to D(3), estimated from how many n-grams occur once, twice, three and four times (equation 26)."""
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return np.array([0.0, *_USUAL_DISCOUNTS])
    y = n1 / (n1 + 2 * n2)
    estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    usable = all(0 < estimate <= k for k, estimate in enumerate(estimates, start=1))
    return np.array([0.0, *(estimates if usable else _USUAL_DISCOUNTS)])
