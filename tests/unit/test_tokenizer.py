"""Tokenizers: round trips through ids and through a file, and their errors."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import tokenizers
from forked import hvdlm
from tokenizers import models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hvdlm.data import tokenizer
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError

TEXTS = [
    "plain words\n",
    "  spaces \t and\r\nline ends\n\n",
    "Grüße, 世界, 🙂 and \x00 controls \x7f",
    "a literal <|endoftext|> is text",
    "",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train([f"the cat number {i} sat on the mat\n" for i in range(200)], 280)


def test_byte_ids_are_the_utf8_bytes() -> None:
    tokenizer = Tokenizer.byte()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("aé\n") == [0x61, 0xC3, 0xA9, 0x0A]


def test_byte_shortcut_agrees_with_the_library(tmp_path: Path) -> None:
    Tokenizer.byte().save(tmp_path / "tokenizer.json")
    library = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = library.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert Tokenizer.byte().encode(text) == ids


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_round_trip_through_a_file(name: str, bpe: Tokenizer, tmp_path: Path) -> None:
    tokenizer = bpe if name == "bpe" else Tokenizer.byte()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    for text, ids in zip(TEXTS, loaded.encode_batch(TEXTS), strict=True):
        assert ids == tokenizer.encode(text)
        assert loaded.decode(ids) == text
        assert tokenizer.eos_id not in ids


def test_bpe_merges_what_repeats(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 280
    assert len(bpe.encode("the cat sat on the mat")) < 11


def test_training_is_deterministic(bpe: Tokenizer) -> None:
    again = Tokenizer.train([f"the cat number {i} sat on the mat\n" for i in reversed(range(200))], 280)
    assert again.sha256 == bpe.sha256


RUNS = ["a" * 2500, "0" * 1001, " " * 3000, "=" * 1001, "_-" * 600, "ab12" * 1000, "世界" * 800, "x" * 1000]


def test_a_long_run_is_learnt_from_in_pieces() -> None:
    texts = ["the cat ", *RUNS, "the cat " + "b" * 1001 + "\n " + "\n" * 1500 + "the mat"]
    for text in texts:
        pieces = list(tokenizer._without_long_runs(text))
        assert "".join(pieces) == text
        for piece in pieces:
            longest = max(len(run) for run in re.findall(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+|\s+", piece))
            assert longest <= tokenizer.LONGEST_RUN
    assert [len(piece) for piece in tokenizer._without_long_runs(RUNS[0])] == [1000, 1000, 500]


def test_ordinary_text_is_learnt_from_as_by_the_library() -> None:
    texts = [*TEXTS, "1" * 1000, "base64 " + "a1B2" * 5000, "word, " * 5000, "the cat sat on the mat\n" * 100]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 400, "min_frequency": 2, "special_tokens": ["<|endoftext|>"]}
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False, **options)
    backend.train_from_iterator(texts, trainer)
    backend.encode_special_tokens = True  # as text
    trained = Tokenizer.train(texts, 400)
    for text in [*TEXTS, *RUNS, "the cat sat on the mat", "base64a1B2"]:
        assert trained.encode(text) == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", RUNS, ids=[run[:4] for run in RUNS])
def test_long_runs_are_encoded_whole(text: str, bpe: Tokenizer) -> None:
    assert bpe.decode(bpe.encode(text * 50)) == text * 50


def test_too_little_text_gives_a_smaller_vocabulary() -> None:
    assert Tokenizer.train(["abc"], 1000).vocab_size == 257


def test_truncation_and_padding_of_a_file_are_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 7}, unk_token="a"))
    backend.enable_truncation(1)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "short.json"))
    tokenizer = Tokenizer.load(tmp_path / "short.json")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (8, 7)
    assert tokenizer.encode("a") == [0]


def test_no_end_of_text_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "endless.json"))
    with pytest.raises(HvdlmError, match=r"endless\.json has no token that ends a document; add one of"):
        Tokenizer.load(tmp_path / "endless.json")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("bpe:abc", "--tokenizer bpe:abc: the vocabulary must be a number of at least 257"),
        (
            "bpe:99999999999999999999",
            "--tokenizer bpe:99999999999999999999: the vocabulary must be a number of at least",
        ),
        ("bpe:256", "--tokenizer bpe:256: the vocabulary must be a number of at least 257"),
        ("missing.json", "--tokenizer missing.json: no such file; give byte, bpe:VOCAB or the path"),
        ("document.txt", "document.txt is not a tokenizer.json"),
    ],
)
def test_bad_choice_is_one_sentence(tokenizer: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "document.txt").write_text("text")
    command = ["prepare", "--input", "document.txt", "--output", "out", "--tokenizer", tokenizer]
    done = hvdlm(*command, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def saved(tmp_path: Path, backend: tokenizers.Tokenizer) -> Path:
    backend.save(str(tmp_path / "own.json"))
    return tmp_path / "own.json"


def test_dropout_of_merges_is_switched_off(tmp_path: Path) -> None:
    """With it a text has other tokens each time."""
    words = {character: index for index, character in enumerate(["a", "b", "ab", "abab", "<|endoftext|>"])}
    path = saved(tmp_path, tokenizers.Tokenizer(models.BPE(words, [("a", "b"), ("ab", "ab")], dropout=0.5)))
    tokenizer = Tokenizer.load(path)
    assert {tuple(tokenizer.encode("abababab")) for _ in range(50)} == {(3, 3)}
    tokenizer.save(tmp_path / "again.json")
    assert Tokenizer.load(tmp_path / "again.json").encode("abab") == [3]


def test_a_text_that_the_tokenizer_has_no_tokens_for(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="[UNK]"))
    tokenizer = Tokenizer.load(saved(tmp_path, backend))
    assert tokenizer.encode_batch(["a", "a"]) == [[0], [0]]
    with pytest.raises(HvdlmError, match=r"cannot encode the text that begins with 'b' \(.*UNK.*; take one that"):
        tokenizer.encode_batch(["a", "b"])


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_not_the_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064}\nsize 330454481\n")
    words = ["--tokenizer", name] if name == "tokenizer.json" else ["--input", name]
    done = hvdlm("prepare", "--input", "good.txt", *words, "--output", "out", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 1
    assert f"{name}" in done.stderr and "is a Git LFS pointer, not the file: run `git lfs pull`" in done.stderr
    assert not (tmp_path / "out").exists()
