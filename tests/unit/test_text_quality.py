"""Measures of generated text, by hand."""

from __future__ import annotations

import pytest

from hvdlm.errors import HvdlmError
from hvdlm.scoring.text_quality import check_rouge, distinct, repetition, rouge, vocabulary_coverage

# 3-grams: 123 231 312 123, and 456; 4-grams: 1231 2312 3123, and none
TEXTS = [[1, 2, 3, 1, 2, 3], [4, 5, 6]]


def test_distinct() -> None:
    assert distinct(TEXTS, 1) == pytest.approx(6 / 9)
    assert distinct(TEXTS, 2) == pytest.approx(5 / 7)  # 12 23 31 12 23, 45 56
    assert distinct(TEXTS, 3) == pytest.approx(4 / 5)
    assert distinct(TEXTS, 4) == 1
    assert distinct(TEXTS, 7) == 0
    assert distinct([[1, 2], [1, 2]], 2) == 0.5  # of all texts together


def test_repetition() -> None:
    assert repetition(TEXTS, 3) == pytest.approx((1 / 4 + 0) / 2)
    assert repetition(TEXTS) == 0  # the shorter text has no 4-gram, and does not count
    assert repetition([[1] * 8, [1, 2, 3, 4]]) == pytest.approx((4 / 5 + 0) / 2)
    assert repetition([[1, 2], []]) == 0


def test_vocabulary() -> None:
    assert vocabulary_coverage(TEXTS, 24) == 6 / 24
    assert vocabulary_coverage([[]], 24) == 0


def test_rouge() -> None:
    """Lin's example (section 3): "police killed the gunman" and "police kill the gunman" share 3 words of 4."""
    found = rouge(["police kill the gunman"], ["Police killed the gunman."])
    assert found == pytest.approx({"rouge1": 3 / 4, "rouge2": 1 / 3, "rougeL": 3 / 4})
    # "the gunman police killed": all words, and of the longest common subsequence 2 of 4
    found = rouge(["the gunman police killed"], ["police killed the gunman"])
    assert found == pytest.approx({"rouge1": 1, "rouge2": 2 / 3, "rougeL": 1 / 2})
    # 2 words of 2 and of 4: precision 1, recall 1/2; in the mean with a text that has nothing in common
    found = rouge(["漢字 Ünter", "x"], ["漢字 ünter é ß", "y"])
    assert found == pytest.approx({"rouge1": 2 / 6, "rouge2": (2 / 4) / 2, "rougeL": 2 / 6})


def test_without_rouge_score_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HvdlmError, match=r"--samples needs rouge-score, .*: pip install 'hvdlm\[lm-eval\]'"):
        check_rouge("--samples")
