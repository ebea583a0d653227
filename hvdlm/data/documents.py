"""Reads documents from input files, in blocks that worker processes handle independently."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hvdlm.data.file_errors import LFS_POINTER, is_lfs_pointer
from hvdlm.data.input_files import UNREADABLE, Holds, InputFile
from hvdlm.data.json_records import MAX_DOCUMENT_BYTES, json_values
from hvdlm.data.splitting import BLOCK_BYTES, Piece, Split, split_into_parts, split_text
from hvdlm.data.tables import read_rows
from hvdlm.errors import HvdlmError

_LEAST_ROW_BYTES = 64  # a row counts as at least this long, also one without a text

SMALLEST_FILE_BYTES = 2**12  # a file counts as at least this large, since opening one costs as much as reading this


@dataclass(frozen=True, kw_only=True)
class Block:
    """A work item of some documents.

    Attributes:
        input_bytes: as stored on disk, before decompression.
        source: index of the source to which its documents belong.
        shard: of this source, to which all its documents belong, or None if each is assigned by its own bytes.
        is_continued: the last document goes on in the next block of the same shard.
    """

    input_bytes: int
    source: int = 0
    shard: int | None = None
    is_continued: bool = False

    def belonging_to(self, shard: int) -> Block:
        """This block with all its documents in one shard."""
        return replace(self, shard=shard)

    def of_source(self, source: int) -> Block:
        """This block with its documents in a source."""
        return replace(self, source=source)


@dataclass(frozen=True, kw_only=True)
class FileBlock(Block):
    """Files of one document each, which are only read by `read_documents`."""

    files: tuple[InputFile, ...]


@dataclass(frozen=True, kw_only=True)
class RecordBlock(Block):
    """Records of a JSON Lines file or of a JSON array.

    Attributes:
        first: number of the first record, from 1.
        unit: what is numbered, in messages: ":" before the number of a line, ", record " of a record.
        failure: why reading stopped after these, or "".
    """

    path: Path
    first: int
    records: tuple[bytes, ...]
    unit: str = ":"
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class RowBlock(Block):
    """Rows of a table.

    Attributes:
        first: number of the first row, from 1.
        values: of the column of texts.
        failure: why reading stopped after these, or "".
    """

    path: Path
    first: int
    values: tuple[Any, ...]
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class TextBlock(Block):
    """Documents of a text file that is divided into several. `failure`: why reading stopped after these, or ""."""

    file: InputFile
    pieces: tuple[Piece, ...]
    failure: str = ""


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used: `where` it is, as "file:line", and its `problem`."""

    where: str
    problem: str


def read_blocks(files: Sequence[InputFile], split: Split = None, text_key: str = "text") -> Iterator[Block]:
    """The input in order, in blocks of about BLOCK_BYTES; `split`: how text files are divided into documents;
    `text_key`: the column of tables that is read.

    Text files that are one document are not read here.
    """
    whole: list[InputFile] = []
    size = 0
    for file in files:
        is_whole = file.holds == Holds.OBJECT or (file.holds == Holds.TEXT and split is None)
        if is_whole:
            whole.append(file)
            size += max(file.size, SMALLEST_FILE_BYTES)
        if whole and (not is_whole or size >= BLOCK_BYTES):
            yield _file_block(whole)
            whole, size = [], 0
        if file.holds == Holds.TEXT and not is_whole:
            yield from _text_blocks(file, split)
        elif file.holds == Holds.ROWS:
            yield from _row_blocks(file, text_key)
        elif not is_whole:
            yield from _record_blocks(file)
    if whole:
        yield _file_block(whole)


def read_parts(file: InputFile, ends: Sequence[int], shards: Sequence[int]) -> Iterator[Block]:
    """A text file that is one document, divided at the bytes `ends` into parts: one for each of `shards`."""
    position = 0
    try:
        with file.open() as (raw, stream):
            for part in split_into_parts(stream, ends):
                yield TextBlock(
                    file=file,
                    pieces=(part.piece,),
                    input_bytes=raw.tell() - position,
                    shard=shards[part.index],
                    is_continued=not part.is_last,
                )
                position = raw.tell()
    except UNREADABLE as error:
        yield TextBlock(file=file, pieces=(), input_bytes=file.size - position, failure=_unreadable(error))


def content_bytes(file: InputFile) -> int:
    """The size of a file's content, decompressed. Raises one of UNREADABLE."""
    if not file.is_compressed:
        return file.size
    with file.open() as (_, stream):
        return sum(iter(lambda: len(stream.read(BLOCK_BYTES)), 0))


def read_documents(block: Block, text_key: str) -> Iterator[str | BadDocument]:
    """The text of each document of a block, in order, or a BadDocument if it cannot be used."""
    if isinstance(block, FileBlock):
        for file in block.files:
            document = _read_file(file, text_key)
            if not (file.lenient and isinstance(document, BadDocument)):
                yield document
    elif isinstance(block, TextBlock):
        for piece in block.pieces:
            document = _decode(block.file.path, piece)
            if not (block.file.lenient and isinstance(document, BadDocument)):
                yield document
        if block.failure and not block.file.lenient:
            yield BadDocument(str(block.file.path), block.failure)
    elif isinstance(block, RowBlock):
        for number, value in enumerate(block.values, start=block.first):
            yield _check_text(value, f"{block.path}, row {number}", text_key)
        if block.failure:
            yield BadDocument(str(block.path), block.failure)
    elif isinstance(block, RecordBlock):
        for number, record in enumerate(block.records, start=block.first):
            if record.strip():
                yield _read_record(record, f"{block.path}{block.unit}{number}", text_key)
        if block.failure:
            yield BadDocument(f"{block.path}{block.unit}{block.first + len(block.records)}", block.failure)


def _file_block(files: Sequence[InputFile]) -> FileBlock:
    return FileBlock(files=tuple(files), input_bytes=sum(file.size for file in files))


def _text_blocks(file: InputFile, split: Split) -> Iterator[TextBlock]:
    pieces: list[Piece] = []
    size = position = 0
    failure = ""
    try:
        with file.open() as (raw, stream):
            is_empty = True
            for piece in split_text(stream, split):
                is_empty = False
                pieces.append(piece)
                size += len(piece.content)
                if size >= BLOCK_BYTES:
                    yield TextBlock(file=file, pieces=tuple(pieces), input_bytes=raw.tell() - position)
                    pieces, size, position = [], 0, raw.tell()
            if is_empty:
                pieces.append(Piece(1, b""))
    except UNREADABLE as error:
        failure = _unreadable(error)
    yield TextBlock(file=file, pieces=tuple(pieces), input_bytes=file.size - position, failure=failure)


def _record_blocks(file: InputFile) -> Iterator[RecordBlock]:
    made = RecordBlock(path=file.path, first=1, records=(), input_bytes=0)
    if file.holds == Holds.VALUES:
        made = replace(made, unit=", record ")
    records: list[bytes] = []
    size = position = 0

    def block(end: int, failure: str = "") -> RecordBlock:
        nonlocal made, records, size, position
        whole = replace(made, records=tuple(records), input_bytes=end - position, failure=failure)
        made = replace(made, first=made.first + len(records) + bool(failure))
        records, size, position = [], 0, end
        return whole

    try:
        with file.open() as (raw, stream):
            for record in _values(stream) if file.holds == Holds.VALUES else _lines(stream):
                if record is None:
                    yield block(raw.tell(), _TOO_LONG)
                    continue
                records.append(record)
                size += len(record)
                if size >= BLOCK_BYTES:
                    yield block(raw.tell())
    except UNREADABLE as error:
        yield block(file.size, _unreadable(error))
    except (ValueError, RecursionError) as error:
        yield block(file.size, f"is not JSON, so neither it nor what follows can be read ({error})")
    else:
        yield block(file.size)


def _row_blocks(file: InputFile, text_key: str) -> Iterator[RowBlock]:
    values: list[Any] = []
    first, size, position, end = 1, 0, 0, 0
    failure = ""
    try:
        for rows in read_rows(file.path, text_key):
            for value in rows.values:
                values.append(value)
                size += _LEAST_ROW_BYTES + (len(value) if isinstance(value, str | bytes) else 0)
                if size >= BLOCK_BYTES:
                    yield RowBlock(path=file.path, first=first, values=tuple(values), input_bytes=end - position)
                    first, values, size, position = first + len(values), [], 0, end
            end = round(file.size * rows.share)
    except UNREADABLE as error:
        failure = _unreadable(error)
    except HvdlmError as error:
        failure = str(error)
    rest = file.size - position
    yield RowBlock(path=file.path, first=first, values=tuple(values), input_bytes=rest, failure=failure)


def _lines(stream: io.BufferedIOBase) -> Iterator[bytes | None]:
    """The lines of a file, None for one that is too long."""
    while line := stream.readline(MAX_DOCUMENT_BYTES):
        if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_DOCUMENT_BYTES)
            yield None
        else:
            yield line


def _values(stream: io.BufferedIOBase) -> Iterator[bytes | None]:
    return (value.encode(errors="surrogatepass") for value in json_values(stream))


_TOO_LONG = f"is longer than {MAX_DOCUMENT_BYTES // 2**20} MiB; split it into several documents"


def _unreadable(error: Exception) -> str:
    return f"cannot be read ({error})"


def _read_file(file: InputFile, text_key: str) -> str | BadDocument:
    try:
        with file.open() as (_, stream):
            content = stream.read(MAX_DOCUMENT_BYTES + 1)
    except UNREADABLE as error:
        return BadDocument(str(file.path), _unreadable(error))
    document = _decode(file.path, Piece(1, content))
    if file.holds == Holds.OBJECT and isinstance(document, str):
        try:
            record = json.loads(document)
        except (ValueError, RecursionError):
            return document
        if isinstance(record, dict) and text_key in record:
            return _read_record(content, str(file.path), text_key)
    return document


def _decode(path: Path, piece: Piece) -> str | BadDocument:
    content = piece.content

    def where(position: int) -> str:
        line = piece.line + content.count(b"\n", 0, position)
        return f"{path}:{line}"

    if len(content) > MAX_DOCUMENT_BYTES:
        place = str(path) if piece.line == 1 else where(0)
        return BadDocument(place, f"{_TOO_LONG} with --split")
    if piece.line == 1 and is_lfs_pointer(content):
        return BadDocument(where(0), LFS_POINTER)
    if (nul := content.find(b"\0")) >= 0:
        return BadDocument(where(nul), "holds a NUL byte, so this is a binary file, not text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadDocument(where(error.start), f"is not UTF-8 ({error.reason}); convert the file")
    return text or BadDocument(str(path), "is empty")


def _read_record(line: bytes, where: str, text_key: str) -> str | BadDocument:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadDocument(where, f"is not UTF-8 ({error.reason}); convert the file")
    except (ValueError, RecursionError) as error:
        return BadDocument(where, LFS_POINTER if is_lfs_pointer(line) else f"is not JSON ({error})")
    if not isinstance(record, dict):
        return BadDocument(where, 'is not a JSON object; each record must be one, as in {"text": "..."}')
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:10])) or "none"
        return BadDocument(where, f"has no key {text_key!r} (its keys: {keys}); name the right one with --text-key")
    return _check_text(record[text_key], where, text_key)


def _check_text(text: object, where: str, text_key: str) -> str | BadDocument:
    if isinstance(text, bytes):  # of a table
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            return BadDocument(where, f"is not UTF-8 ({error.reason}); convert the file")
    if not isinstance(text, str):
        return BadDocument(where, f"has a {text_key!r} that is no string")
    if len(text) > MAX_DOCUMENT_BYTES:
        return BadDocument(where, _TOO_LONG)
    if "\0" in text:
        return BadDocument(where, "holds a NUL character, so this is binary data, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadDocument(where, "holds half of a surrogate pair, which no UTF-8 text can")
    return text or BadDocument(where, "is empty")
