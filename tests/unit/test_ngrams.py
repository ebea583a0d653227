"""Kneser-Ney models, against one that is written as the formulas stand, over dictionaries."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hvdlm.data.ngrams import KneserNey

VOCAB = 7
BOUND = -1  # stands before the first token of a shard

Gram = tuple[int, ...]


def texts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    """Tokens of which some are far more likely than others, and that depend on the one before."""
    random = np.random.default_rng(seed)
    found = []
    for length in lengths:
        tokens = [0]
        while len(tokens) < length:
            tokens.append(int((tokens[-1] + random.geometric(0.45)) % (VOCAB - 1)))  # the last token never occurs
        found.append(tokens)
    return found


class Plain:
    """Chen & Goodman 1999, section 3."""

    def __init__(self, shards: list[list[int]], order: int) -> None:
        self.order = order
        self.occurrences = [
            Counter(tuple(shard[i : i + n]) for shard in shards for i in range(len(shard) - n + 1))
            for n in range(1, order + 1)
        ]
        longer = [
            {tuple([BOUND, *shard][i : i + n + 1]) for shard in shards for i in range(len(shard) + 1 - n)}
            for n in range(1, order)
        ]
        self.distinct_before = [Counter(gram[1:] for gram in grams) for grams in longer]

    def counts(self, n: int) -> Counter[Gram]:
        return self.occurrences[n - 1] if n == self.order else self.distinct_before[n - 1]

    def discount(self, n: int, count: int) -> float:
        of_counts = Counter(self.counts(n).values())
        n1, n2, n3, n4 = (of_counts[k] for k in (1, 2, 3, 4))
        usual = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5}
        if 0 in (n1, n2, n3):
            return usual[min(count, 3)]
        y = n1 / (n1 + 2 * n2)
        own = {0: 0.0, 1: 1 - 2 * y * n2 / n1, 2: 2 - 3 * y * n3 / n2, 3: 3 - 4 * y * n4 / n3}
        return (own if all(0 < own[k] <= k for k in (1, 2, 3)) else usual)[min(count, 3)]

    def probability(self, history: Gram, token: int, n: int) -> float:
        if n == 0:
            return 1 / VOCAB
        h = history[len(history) - n + 1 :]
        lower = self.probability(history, token, n - 1)
        if len(history) < n - 1:
            return lower
        counts = self.counts(n)
        after = {w: counts[(*h, w)] for w in range(VOCAB)}
        total = sum(after.values())
        if not total:
            return lower
        gamma = sum(self.discount(n, count) for count in after.values() if count) / total
        return max(after[token] - self.discount(n, after[token]), 0) / total + gamma * lower


@pytest.mark.parametrize("lengths", [(400,), (5, 300, 1, 2, 90), (3,)])
def test_each_order_is_what_the_formulas_say(lengths: tuple[int, ...]) -> None:
    shards = texts(3, lengths)
    model = KneserNey([np.array(shard) for shard in shards], VOCAB, order=4)
    read = [*texts(4, (60,))[0], VOCAB - 1, 0, 1]
    measured = model.probabilities(np.array(read))
    for order in range(1, 5):
        plain = Plain(shards, order)
        expected = [plain.probability(tuple(read[:i]), read[i], order) for i in range(len(read))]
        assert measured[order - 1] == pytest.approx(expected, rel=1e-12)


def test_a_distribution_is_that_of_the_highest_order_and_sums_to_one() -> None:
    shards = texts(5, (200, 50))
    model, plain = KneserNey([np.array(shard) for shard in shards], VOCAB, order=3), Plain(shards, 3)
    for before in ([], [1], [0, 1], [2, 5, 4], [VOCAB - 1], [0, VOCAB - 1], [VOCAB - 1, 2]):
        own = model.distribution(before)
        expected = [plain.probability(tuple(before), token, 3) for token in range(VOCAB)]
        assert own == pytest.approx(expected, rel=1e-12)
        assert own.sum() == pytest.approx(1, rel=1e-12)


def test_of_no_tokens_all_are_equally_likely() -> None:
    model = KneserNey([], VOCAB, order=3)
    assert model.probabilities(np.array([1, 2, 3])) == pytest.approx(np.full((3, 3), 1 / VOCAB))
    assert model.distribution([1, 2]) == pytest.approx(np.full(VOCAB, 1 / VOCAB))
