"""Random input tokens: how many, which, and on what they depend."""

from __future__ import annotations

import numpy as np

from hvdlm.data.token_replacement import replace_tokens

END = 3


def replaced(share: float, key: tuple[int, int, int] = (0, 5, 2), vocab_size: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Before and after."""
    before = np.arange(20_000, dtype=np.int64) % vocab_size
    after = before.copy()
    replace_tokens(after, share, key, vocab_size, END)
    return before, after


def test_as_many_as_asked_for_by_any_token_but_the_end_of_text() -> None:
    before, after = replaced(0.3)
    changed = before != after
    # a token is drawn again with probability 1/6
    assert abs(changed[before != END].mean() - 0.3 * 5 / 6) < 0.01
    assert not changed[before == END].any()
    counts = np.bincount(after[changed], minlength=7)
    assert counts[END] == 0 and (np.abs(counts[[0, 1, 2, 4, 5, 6]] / counts.sum() - 1 / 6) < 0.02).all()


def test_all_and_none() -> None:
    before, after = replaced(0.0)
    assert (before == after).all()
    before, after = replaced(1.0, vocab_size=2 + END)
    assert ((before == END) == (after == END)).all()


def test_it_depends_on_seed_batch_and_place() -> None:
    first = replaced(0.3)[1]
    assert (first == replaced(0.3)[1]).all()
    for other in ((1, 5, 2), (0, 6, 2), (0, 5, 3)):
        assert (first != replaced(0.3, other)[1]).any()
