"""What generated text is like, beside its loss: how varied, how repetitive, how close to what was to be written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from hvdlm.errors import check_installed

Tokens = Sequence[int]


def distinct(texts: Sequence[Tokens], n: int) -> float:
    """Distinct-n: different n-grams over all n-grams of all texts together (Li et al. 2016, arXiv:1510.03055, section
    5.3, which divides by the number of tokens). 0 if no text has n tokens."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[Tokens], n: int = 4) -> float:
    """Share of a text's n-grams that it has had before, in the mean over texts of at least n tokens: seq-rep-n of
    Welleck et al. 2020 (arXiv:1908.04319, section 6.1). 0 if there are none."""
    shares = [1 - len(set(grams)) / len(grams) for text in texts if (grams := _ngrams(text, n))]
    return fmean(shares) if shares else 0.0


def vocabulary_coverage(texts: Sequence[Tokens], vocab_size: int) -> float:
    """Share of a vocabulary that occurs in the texts."""
    return len({token for text in texts for token in text}) / vocab_size


def check_rouge(wanted_by: str) -> None:
    """Raises HvdlmError if rouge-score is not installed; `wanted_by` begins the sentence."""
    check_installed("rouge_score", wanted_by, "rouge-score", "lm-eval")


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of each text against its reference, F1, in the mean over texts (Lin 2004, "ROUGE: A
    Package for Automatic Evaluation of Summaries", sections 2 and 3), by the library rouge-score.

    Words are runs of letters and digits of any script, in lower case and not stemmed: the library's own words are
    ASCII. Names: rouge1, rouge2, rougeL.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, tokenizer=_Words())
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {kind: fmean(each[kind].fmeasure for each in scores) for kind in kinds}


class _Words:
    """What RougeScorer takes as a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def _ngrams(text: Tokens, n: int) -> list[tuple[int, ...]]:
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]
