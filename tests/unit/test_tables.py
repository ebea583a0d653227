"""Parquet and Arrow files, what `datasets` saves, and .zst: documents are those of the same records in JSON Lines."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from backports import zstd
from pyarrow import parquet

from hvdlm.data.documents import BadDocument, RowBlock, read_blocks, read_documents
from hvdlm.data.file_errors import LFS_POINTER
from hvdlm.data.input_files import find_files
from hvdlm.data.prepare import prepare
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError


def texts(count: int = 3000) -> list[str]:
    """Some of them long, so that they fill several blocks."""
    draw = random.Random(0)
    return [f"text {number} é " + "x" * draw.randrange(2000) for number in range(count)]


def table(values: list[Any], column: str = "text") -> pyarrow.Table:
    return pyarrow.table({"id": list(range(len(values))), column: values})


def documents(*inputs: Path, key: str = "text") -> Iterator[str | BadDocument]:
    files, _ = find_files([str(each) for each in inputs])
    blocks = list(read_blocks(files, text_key=key))
    assert sum(block.input_bytes for block in blocks) == sum(file.size for file in files)
    for block in blocks:
        yield from read_documents(block, key)


def save_as_datasets_does(directory: Path, values: list[str], files: int = 2) -> None:
    """The files of `Dataset.save_to_disk` of datasets 5.2: streams of record batches, and two descriptions."""
    directory.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    step = -(-len(values) // files)
    for number, name in enumerate(names):
        part = table(values[number * step : (number + 1) * step])
        with pyarrow.OSFile(str(directory / name), "wb") as sink, pyarrow.ipc.new_stream(sink, part.schema) as writer:
            for batch in part.to_batches(max_chunksize=1000):
                writer.write_batch(batch)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (directory / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))


def test_rows_of_parquet_in_order(tmp_path: Path) -> None:
    parquet.write_table(table(texts()), tmp_path / "a.parquet", row_group_size=700)
    parquet.write_table(table(["last"]), tmp_path / "b.PARQUET", compression="zstd")
    assert list(documents(tmp_path)) == [*texts(), "last"]


def test_rows_of_arrow_files(tmp_path: Path) -> None:
    data = table(texts())
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=500)
    assert list(documents(tmp_path)) == texts()


def test_what_datasets_saves(tmp_path: Path) -> None:
    save_as_datasets_does(tmp_path / "saved" / "train", texts())
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert list(documents(tmp_path / "saved")) == texts()


@pytest.mark.parametrize(
    "inputs", [["saved/*"], ["saved/*/*"], ["saved/**"], ["saved/train/*"], ["saved/train"], ["each file, by name"]]
)
def test_what_datasets_saves_by_a_glob_or_by_names(inputs: list[str], tmp_path: Path) -> None:
    """A shell makes names of a glob that is not quoted."""
    save_as_datasets_does(tmp_path / "saved" / "train", texts(100))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    named = sorted(each for each in (tmp_path / "saved").rglob("*") if each.is_file())
    assert len(named) == 5
    paths = named if inputs == ["each file, by name"] else [tmp_path / each for each in inputs]
    assert list(documents(*paths)) == texts(100)


def test_a_state_json_that_describes_nothing_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"text": "of the art"}')
    assert list(documents(tmp_path / "*")) == list(documents(tmp_path)) == ["of the art"]


def test_zst(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts())
    frames = zstd.compress(lines[:1000].encode()) + zstd.compress(lines[1000:].encode())
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    (tmp_path / "b.txt.zst").write_bytes(zstd.compress(b"one text"))
    assert list(documents(tmp_path)) == [*texts(), "one text"]


def test_a_data_set_of_parquet_is_that_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts()))
    parquet.write_table(table(texts(), "body"), tmp_path / "a.parquet")
    shared = {"tokenizer": "byte", "shards": 2, "validation": 0.1, "workers": 2, "text_key": "body", "seed": 0}
    for suffix in ("jsonl", "parquet"):
        prepare([str(tmp_path / f"a.{suffix}")], tmp_path / suffix, skip_bad=False, **shared)  # type: ignore[arg-type]
    assert DataSet(tmp_path / "parquet").fingerprint == DataSet(tmp_path / "jsonl").fingerprint


@pytest.mark.parametrize(
    ("values", "where", "problem"),
    [
        (["a", None], ", row 2", "has a 'text' that is no string"),
        (["a", ""], ", row 2", "is empty"),
        ([1, 2], ", row 1", "has a 'text' that is no string"),
        (["a\0b"], ", row 1", "holds a NUL character"),
    ],
)
def test_bad_rows_are_named(values: list[Any], where: str, problem: str, tmp_path: Path) -> None:
    parquet.write_table(table(values), tmp_path / "a.parquet")
    bad = next(each for each in documents(tmp_path) if isinstance(each, BadDocument))
    assert bad.where == f"{tmp_path / 'a.parquet'}{where}"
    assert problem in bad.problem


def test_a_pointer_of_git_lfs_is_not_the_table(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (tmp_path / "a.parquet").write_text(pointer)
    assert list(documents(tmp_path)) == [BadDocument(str(tmp_path / "a.parquet"), LFS_POINTER)]


def test_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"b\xffd", b"too"]).cast(pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])  # as a writer that does not look
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    expected = BadDocument(f"{tmp_path / 'a.parquet'}, row 2", "is not UTF-8 (invalid start byte); convert the file")
    assert list(documents(tmp_path)) == ["good", expected, "too"]


def test_blocks_are_short_whatever_a_column_holds(tmp_path: Path) -> None:
    parquet.write_table(table(list(range(200_000))), tmp_path / "a.parquet")
    parquet.write_table(table(["x" * 700_000] * 20), tmp_path / "b.parquet")
    for name, longest in (("a", 20_000), ("b", 2)):
        files, _ = find_files([str(tmp_path / f"{name}.parquet")])
        blocks = list(read_blocks(files))
        assert max(len(block.values) for block in blocks if isinstance(block, RowBlock)) <= longest


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    parquet.write_table(table(["a"]), tmp_path / "a.parquet")
    expected = "has no column 'body' (its columns: 'id', 'text'); name the right one with --text-key"
    assert list(documents(tmp_path, key="body")) == [BadDocument(str(tmp_path / "a.parquet"), expected)]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "no such file"])
def test_damaged_files_are_named(kind: str, damage: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet.write_table(table(texts()), file)
    elif kind == "arrow":
        save_as_datasets_does(tmp_path / "saved", texts(), files=1)
        file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    else:
        file.write_bytes(zstd.compress("".join(texts()).encode()))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"nothing of the kind" * 100)
    bad = [each for each in documents(file) if isinstance(each, BadDocument)]
    assert [each.where for each in bad] == [str(file)]
    assert "cannot be read" in bad[0].problem


def test_what_is_missing_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.parquet", "a.txt.zst"):
        (tmp_path / name).touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        HvdlmError, match=r"a\.parquet is a table, which is read by pyarrow: pip install 'hvdlm\[data\]'"
    ):
        find_files([str(tmp_path / "a.parquet")])
    monkeypatch.setattr("hvdlm.data.zstandard.zstd", None)
    with pytest.raises(HvdlmError, match=r"a\.txt\.zst is compressed with Zstandard: pip install 'hvdlm\[data\]'"):
        find_files([str(tmp_path / "a.txt.zst")])
