"""What `--input` names: files of text and of JSON records by what they hold, and what is no file at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
from pathlib import Path

import pytest
from forked import hvdlm

from hvdlm.data import json_records
from hvdlm.data.documents import BadDocument, read_blocks, read_documents
from hvdlm.data.input_files import find_files
from hvdlm.data.json_records import json_values
from hvdlm.errors import HvdlmError

RECORDS = [{"text": f"document {i} {{[,] 🙂 Grüße", "id": i, "tags": [1, {"a": None}]} for i in range(50)]
TEXTS = [record["text"] for record in RECORDS]
LINES = "\n".join(map(json.dumps, RECORDS))


def read(*paths: Path) -> list[str | BadDocument]:
    files, _ = find_files([str(path) for path in paths])
    return [document for block in read_blocks(files) for document in read_documents(block, "text")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonlines", "a.Ndjson", "a.json", "a.JSON"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_record_a_line(name: str, compressed: bool, tmp_path: Path) -> None:
    path = tmp_path / (f"{name}.GZ" if compressed else name)
    path.write_bytes(gzip.compress(LINES.encode()) if compressed else LINES.encode())
    assert read(path) == TEXTS


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        "\ufeff \n[\n\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
        "\n".join(json.dumps(record, indent=1) for record in RECORDS),
        "".join(json.dumps(record) for record in RECORDS),
        "\n\n" + LINES + "\n\n",
    ],
    ids=["array", "indented array", "array of lines", "indented objects", "objects in a line", "blank lines"],
)
def test_records_of_a_json_file(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "_FIRST_READ", 50)  # so that records lie across what is read at once
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert read(tmp_path / "a.json") == TEXTS


@pytest.mark.parametrize("content", ['{"a": 1}', '{\n "a": {"text": 1}\n}', "[1, 2]", "[]", '"x"', "no JSON", '{"a'])
def test_a_json_file_without_records_is_a_document_of_text(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert read(tmp_path / "a.json") == [content]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_of_one_record(indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "id": 5}, indent=indent))
    assert read(tmp_path / "a.json") == ["one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"body": "b"}]', "a.json, record 2 has no key 'text' (its keys: 'body')"),
        ('{"body": "a"}\n{"body": "b"}', "a.json:1 has no key 'text' (its keys: 'body')"),
        ('[{"text": "a"}, {"text": "b"', "a.json, record 2 is not JSON, so neither it nor what follows can be read"),
        ('[{"text": "a"}, {"text": "b"}', "a.json, record 3 is not JSON, so neither it nor what follows can be read"),
        ('[{"text": "a"} {"text": "b"}]', "a.json, record 2 is not JSON, so neither it nor what follows can be read"),
        ('[{"text": "a"}, 5]', "a.json, record 2 is not a JSON object"),
    ],
)
def test_a_bad_record_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    bad = [document for document in read(tmp_path / "a.json") if isinstance(document, BadDocument)]
    assert f"{bad[0].where} {bad[0].problem}".startswith(f"{tmp_path}/{message}")


def test_values_end_where_they_end() -> None:
    assert list(json_values(io.BytesIO(b'12 34  [5, 6] "]" tru'.replace(b"tru", b"true")))) == [
        "12",
        "34",
        "[5, 6]",
        '"]"',
        "true",
    ]


def test_pipes_and_devices_are_refused_beside_files_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    reading, writing = os.pipe()
    try:
        for name, kind in (("pipe.txt", "a pipe"), (f"/dev/fd/{reading}", "a pipe"), ("/dev/zero", "a device")):
            with pytest.raises(HvdlmError) as caught:
                find_files([str(tmp_path / "a.txt"), str(tmp_path / name)])
            assert f"{tmp_path / name} is {kind}, which can be read only once and by one process" in str(caught.value)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("pattern", ["folder", "folder/*"])
def test_what_is_no_file_in_a_folder_is_named_or_left_out(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_text(LINES)
    os.mkfifo(tmp_path / "folder" / "b.txt")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "folder" / "c.txt"))
    command = ("prepare", "--input", pattern, "--output", "out", "--shards", "2", "--validation", "0.2")
    refused = hvdlm(*command, "--workers", "2", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("hvdlm: error: folder/b.txt is a pipe, not a file; correct the input, or leave")
    assert not (tmp_path / "out").exists()
    skipped = hvdlm(*command, "--workers", "1", "--skip-bad", cwd=tmp_path)
    server.close()
    assert skipped.returncode == 0
    assert "left out 2 bad documents; the first: folder/b.txt is a pipe, not a file" in skipped.stdout


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("nowhere")
    for name in ("a.txt", "*.txt", "."):
        with pytest.raises(HvdlmError, match=r"cannot read the input .*a\.txt: No such file or directory"):
            find_files([str(tmp_path / name)])


def test_a_name_that_is_too_long_is_one_sentence() -> None:
    with pytest.raises(HvdlmError, match="File name too long"):
        find_files(["x" * 300])
