"""Unigram and bigram cross-entropy, against values computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from hvdlm.data import baselines
from hvdlm.data import shard as shard_module
from hvdlm.data.baselines import NgramModel, ngram_baselines
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


@pytest.mark.parametrize("dense_vocabulary", [2048, 0])
@pytest.mark.parametrize("block_tokens", [2**22, 2])
def test_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense_vocabulary: int, block_tokens: int) -> None:
    monkeypatch.setattr(baselines, "DENSE_VOCABULARY", dense_vocabulary)
    monkeypatch.setattr(shard_module, "BLOCK_TOKENS", block_tokens)
    # Tokens 0, 1, 2 occur 2, 2, 1 times; with one added each, p = 3/8, 3/8, 2/8.
    # Pairs 01, 10, 12 occur 2, 1, 1 times; the pair 21 would cross shards.
    data = data_set(tmp_path / "data", 3, [[0, 1, 0, 1, 2]], [[1, 0, 1, 2, 0]])
    bigram = [
        (1 - 0.75) / 2 + 0.75 * 2 / 2 * 3 / 8,  # 0 after 1
        (2 - 0.75) / 2 + 0.75 * 1 / 2 * 3 / 8,  # 1 after 0
        (1 - 0.75) / 2 + 0.75 * 2 / 2 * 2 / 8,  # 2 after 1
        3 / 8,  # 0 after 2, which nothing followed
    ]
    measured = ngram_baselines(data)
    assert measured.unigram == pytest.approx(-(3 * math.log(3 / 8) + math.log(2 / 8)) / 4, rel=1e-12)
    assert measured.bigram == pytest.approx(-sum(map(math.log, bigram)) / 4, rel=1e-12)


def test_pairs_do_not_cross_shards(tmp_path: Path) -> None:
    # Apart, 1 is followed by nothing, so 2 after 1 has its unigram probability (1 + 1) / (2 + 3).
    data = data_set(tmp_path / "data", 3, [[1], [2]], [[1, 2]])
    assert ngram_baselines(data).bigram == pytest.approx(-math.log(2 / 5), rel=1e-12)


@pytest.mark.parametrize("dense_vocabulary", [2048, 0])
def test_distributions_sum_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense_vocabulary: int) -> None:
    monkeypatch.setattr(baselines, "DENSE_VOCABULARY", dense_vocabulary)
    vocab_size = 23
    tokens = (np.random.default_rng(0).integers(0, vocab_size - 3, 500) ** 2 // vocab_size).tolist()
    model = NgramModel.fit(data_set(tmp_path / "data", vocab_size, [tokens], []).train, vocab_size)
    every = np.arange(vocab_size)
    assert model.unigram(every).sum() == pytest.approx(1, rel=1e-12)
    for before in range(vocab_size):
        assert model.bigram(np.full(vocab_size, before), every).sum() == pytest.approx(1, rel=1e-12)


def test_no_validation_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match="has no validation tokens; prepare it with a larger --validation"):
        ngram_baselines(data_set(tmp_path / "data", 3, [[0, 1]], []))
