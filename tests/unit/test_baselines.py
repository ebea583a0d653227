"""Cross-entropy of n-gram models, against values computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from hvdlm.data import ngrams
from hvdlm.data import shard as shard_module
from hvdlm.data.baselines import ngram_baselines
from hvdlm.data.manifest import Manifest
from hvdlm.data.shard import DataSet
from hvdlm.data.shard_writer import ShardWriter
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError


def data_set(directory: Path, vocab_size: int, train: list[list[int]], validation: list[list[int]]) -> DataSet:
    """A data set of exactly these tokens, one list a shard."""
    tokenizer = Tokenizer.byte()
    directory.mkdir()
    tokenizer.save(directory / "tokenizer.json")
    records = []
    for prefix, shards in (("", train), ("val/", validation)):
        for index, tokens in enumerate(shards):
            with ShardWriter(
                directory,
                f"{prefix}{index}.h5",
                index,
                len(shards),
                vocab_size=vocab_size,
                eos_id=0,
                tokenizer_sha256=tokenizer.sha256,
            ) as writer:
                writer.append(np.array(tokens), len(tokens))
                records.append(writer.finish())
    Manifest(
        vocab_size=vocab_size,
        eos_id=0,
        tokenizer_sha256=tokenizer.sha256,
        train=records[: len(train)],
        validation=records[len(train) :],
        recipe={},
    ).save(directory)
    return DataSet(directory)


@pytest.mark.parametrize("block_tokens", [2**22, 5])
def test_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_tokens: int) -> None:
    monkeypatch.setattr(shard_module, "BLOCK_TOKENS", block_tokens)
    # Tokens 0, 1, 2 occur 2, 2, 1 times; pairs 01, 10, 12 occur 2, 1, 1 times. None occurs three times, so that the
    # discounts are 0.5 of what occurs once, and 1 of what occurs twice: 2.5 of 5 tokens.
    data = data_set(tmp_path / "data", 3, [[0, 1, 0, 1, 2]], [[1, 0, 1, 2, 0]])
    unigram = [1 / 5 + 0.5 / 3, 1 / 5 + 0.5 / 3, 0.5 / 5 + 0.5 / 3, 1 / 5 + 0.5 / 3]  # 0, 1, 2, 0
    # Before 0 stand 1 and the bound of the shard, before 1 stands 0, before 2 stands 1: 1 + 0.5 + 0.5 of 4 is taken
    below = {0: 1 / 4 + 0.5 / 3, 1: 0.5 / 4 + 0.5 / 3, 2: 0.5 / 4 + 0.5 / 3}
    bigram = [
        0.5 / 2 + (0.5 + 0.5) / 2 * below[0],  # 0 after 1
        1 / 2 + 1 / 2 * below[1],  # 1 after 0
        0.5 / 2 + (0.5 + 0.5) / 2 * below[2],  # 2 after 1
        below[0],  # 0 after 2, which nothing followed
    ]
    measured = ngram_baselines(data)
    assert len(measured) == 5
    assert measured[0] == pytest.approx(-sum(map(math.log, unigram)) / 4, rel=1e-12)
    assert measured[1] == pytest.approx(-sum(map(math.log, bigram)) / 4, rel=1e-12)


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    train, validation = (random.integers(0, 9, (2, 300)).cumsum(axis=1) % 23 for _ in range(2))
    data = data_set(tmp_path / "data", 23, train.tolist(), validation.tolist())
    whole = ngram_baselines(data)
    monkeypatch.setattr(shard_module, "BLOCK_TOKENS", 7)
    assert ngram_baselines(data) == pytest.approx(whole, rel=1e-12)


def test_no_more_tokens_are_counted_than_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of each shard, and more of long ones where others are short."""
    monkeypatch.setattr(ngrams, "MAX_TOKENS", 8)
    parts = ngram_baselines(data_set(tmp_path / "more", 3, [[0, 1, 0, 0, 0], [1, 2, 2, 2], [2]], [[1, 0, 1, 2, 0]]))
    assert parts == ngram_baselines(data_set(tmp_path / "less", 3, [[0, 1, 0, 0], [1, 2, 2], [2]], [[1, 0, 1, 2, 0]]))


def test_no_validation_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match="has no validation tokens; prepare it with a larger --validation"):
        ngram_baselines(data_set(tmp_path / "data", 3, [[0, 1]], []))
