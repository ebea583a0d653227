"""What `hvdlm prepare` makes of input: one document in parts, text files divided, files for validation, long words."""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path

import pytest
from forked import hvdlm
from test_prepare import make_texts, stored_documents, write_lines

from hvdlm.data.prepare import prepare
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.data.worker_pool import WorkerPool


@pytest.mark.parametrize("name", ["one.txt", "one.txt.gz"])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_of_one_document_the_end_is_validation_and_the_rest_fills_the_shards(
    name: str, tokenizer: str, tmp_path: Path
) -> None:
    text = "\n".join(make_texts(2000))  # 400 KB; lines of up to 400 bytes
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    arguments = ("--output", "out", "--validation", "0.1", "--shards", "5", "--tokenizer", tokenizer)
    done = hvdlm("prepare", "--input", name, *arguments, "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{name} is one document: its last 10.0% are validation" in done.stdout
    documents = stored_documents(tmp_path / "out")
    assert [len(shard) for shard in documents.values()] == [1] * 6
    parts = [shard[0] for shard in documents.values()]
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts[:-1])
    lengths = [len(part.encode()) for part in parts]
    assert abs(lengths[-1] - 0.1 * len(content)) < 400
    assert all(abs(length - 0.18 * len(content)) < 400 for length in lengths[:-1])


def test_one_document_that_is_longer_than_a_document_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("corpus", "documents", "splitting"):
        monkeypatch.setattr(f"hvdlm.data.{module}.MAX_DOCUMENT_BYTES", 10_000)
    for module in ("documents", "splitting"):
        monkeypatch.setattr(f"hvdlm.data.{module}.BLOCK_BYTES", 3000)
    text = "".join(f"line {i}\n" for i in range(3000))
    (tmp_path / "one.txt").write_text(text)
    prepare([str(tmp_path / "one.txt")], tmp_path / "out", "byte", 1, 0.0, 1, "text", 0, skip_bad=False)
    assert stored_documents(tmp_path / "out") == {"shard_00000.h5": [text]}


@pytest.mark.parametrize("skip", [(), ("--skip-bad",)])
def test_a_single_document_that_is_bad_is_named_with_its_line(skip: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"one line\n" * 1000 + b"caf\xe9\n" + b"one line\n" * 500)
    done = hvdlm("prepare", "--input", "one.txt", "--output", "out", "--workers", "1", *skip, cwd=tmp_path)
    assert done.returncode == 1
    sentence = "one.txt:1001 is not UTF-8 (invalid continuation byte); convert the file; correct the input"
    assert done.stderr == f"hvdlm: error: {sentence}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("split", "pattern", "workers"),
    [("lines", r"(.+)\n", "2"), ("blank-lines", r"((?:.+\n)*.+)\n\n", "1"), ("2000", None, "1")],
)
def test_a_text_file_is_divided_into_documents(split: str, pattern: str | None, workers: str, tmp_path: Path) -> None:
    text = "".join(f"line {i} {'x' * 200}\nof paragraph 🙂\n\n" for i in range(6000))  # 1.4 MB, so several blocks
    (tmp_path / "one.txt").write_text(text)
    arguments = ("--output", "out", "--shards", "3", "--validation", "0.1", "--split", split, "--workers", workers)
    done = hvdlm("prepare", "--input", "one.txt", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    documents = [document for shard in stored_documents(tmp_path / "out").values() for document in shard]
    if pattern:
        assert sorted(documents) == sorted(re.findall(pattern, text))
    else:
        assert len("".join(documents)) == len(text)
        sizes = sorted(len(document.encode()) for document in documents)
        assert sizes[1] > 2000 - 250  # all but the last one of the file end with a line; the longest has 207 bytes
        assert sizes[-1] <= 2000
        assert all(document in text for document in documents)


def test_files_for_validation(tmp_path: Path) -> None:
    texts = make_texts(30)
    write_lines(tmp_path / "a.jsonl", texts[:20])
    write_lines(tmp_path / "held.jsonl", texts[20:])
    options = ("--shards", "2", "--output", "out", "--workers", "1")
    command = ("prepare", "--input", "*.jsonl", "--validation-input", "held.jsonl", *options)
    assert hvdlm(*command, cwd=tmp_path).returncode == 0
    documents = stored_documents(tmp_path / "out")
    assert documents["val/shard_00000.h5"] == texts[20:]
    assert sorted(documents["shard_00000.h5"] + documents["shard_00001.h5"]) == sorted(texts[:20])
    assert "is there already" in hvdlm(*command, cwd=tmp_path).stdout
    other = hvdlm("prepare", "--input", "*.jsonl", *options, cwd=tmp_path)
    assert "another validation files (there " in other.stderr
    assert ", here none)" in other.stderr


def test_a_tokenizer_is_not_trained_on_files_for_validation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" abc" * 2000)
    (tmp_path / "held.txt").write_text(" xyz" * 2000)
    arguments = ("--validation-input", "held.txt", "--tokenizer", "bpe:270", "--shards", "1", "--output", "out")
    done = hvdlm("prepare", "--input", "a.txt", *arguments, "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    assert len(tokenizer.encode(" abc")) == 1
    assert len(tokenizer.encode(" xyz")) == 4


def test_workers_are_as_many_as_cores_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Pool(WorkerPool):
        def __init__(self, workers: int) -> None:
            asked.append(workers)
            super().__init__(1)

    monkeypatch.setattr("hvdlm.data.prepare.WorkerPool", Pool)
    monkeypatch.setattr("hvdlm.data.prepare.usable_cores", lambda: 3)
    write_lines(tmp_path / "a.jsonl", make_texts(100))
    for workers in (0, 5):
        prepare(
            [str(tmp_path / "a.jsonl")], tmp_path / f"{workers}", "byte", 2, 0.1, workers, "text", 0, skip_bad=False
        )
    assert asked == [3, 5]


def test_a_million_letters_without_a_blank(tmp_path: Path) -> None:
    """Training took a time that grew with the square of their number: 80,000 letters 7 s, 160,000 letters 28."""
    text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=10**6))
    (tmp_path / "one.txt").write_text(text)
    arguments = ("--tokenizer", "bpe:512", "--shards", "1", "--validation", "0", "--workers", "1")
    done = hvdlm("prepare", "--input", "one.txt", "--output", "out", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert stored_documents(tmp_path / "out") == {"shard_00000.h5": [text]}
