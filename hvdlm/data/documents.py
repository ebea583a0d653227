"""Reads documents from input files, in blocks that worker processes handle independently."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdlm.errors import HvdlmError

PYTHON_STDLIB = "python-stdlib"
BLOCK_BYTES = 2**20  # size of a work item: large enough to outweigh the cost of sending it, small in memory
SMALLEST_FILE_BYTES = 2**12  # a file counts as at least this large, since opening one costs as much as reading this
MAX_DOCUMENT_BYTES = 64 * 2**20  # bounds memory: whole documents are held in memory, a few at a time

UNREADABLE = (OSError, EOFError, zlib.error)  # the last two are raised for a truncated or damaged .gz file


@dataclass(frozen=True)
class Source:
    """An input file. `lenient`: if it is not text, it is skipped silently, not reported as a bad document."""

    path: Path
    size: int  # bytes
    modified: int  # nanoseconds since the epoch
    lenient: bool = False

    @property
    def holds_lines(self) -> bool:
        """True for a JSON Lines file, False for a file that is a single document."""
        return Path(self.path.name.removesuffix(".gz")).suffix in (".jsonl", ".ndjson")


@dataclass(frozen=True)
class FileBlock:
    """Files of one document each, which are only read by `read_documents`."""

    sources: tuple[Source, ...]
    input_bytes: int


@dataclass(frozen=True)
class LineBlock:
    """Lines of a JSON Lines file. `first`: number of the first line, from 1. `failure`: why reading stopped, or ""."""

    path: Path
    first: int
    lines: tuple[bytes, ...]
    input_bytes: int  # as stored on disk, before decompression
    failure: str = ""


Block = FileBlock | LineBlock


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used: `where` it is, as "file:line", and its `problem`."""

    where: str
    problem: str


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The files that `inputs` name, in the order given; the files of a directory or a glob are sorted.

    A file named twice counts once. In directories, hidden names are skipped and links to directories not followed.

    Raises HvdlmError for an input that matches no file, or a file whose size cannot be read.
    """
    found: dict[Path, Source] = {}
    for name in inputs:
        lenient = name == PYTHON_STDLIB
        paths = _standard_library() if lenient else _expand(name)
        for path in paths:
            try:
                status = path.stat()
            except OSError as error:
                raise HvdlmError(f"cannot read the input {path}: {error.strerror}") from None
            found.setdefault(path.resolve(), Source(path, status.st_size, status.st_mtime_ns, lenient))
    return list(found.values())


def read_blocks(sources: Sequence[Source]) -> Iterator[Block]:
    """The input in order, in blocks of about BLOCK_BYTES. Only JSON Lines files are read here, not single documents."""
    files: list[Source] = []
    size = 0
    for source in sources:
        if not source.holds_lines:
            files.append(source)
            size += max(source.size, SMALLEST_FILE_BYTES)
        if files and (source.holds_lines or size >= BLOCK_BYTES):
            yield _file_block(files)
            files, size = [], 0
        if source.holds_lines:
            yield from _line_blocks(source)
    if files:
        yield _file_block(files)


def read_documents(block: Block, text_key: str) -> Iterator[str | BadDocument]:
    """The text of each document of a block, in order, or a BadDocument if it cannot be used."""
    if isinstance(block, FileBlock):
        for source in block.sources:
            document = _read_file(source)
            if not (source.lenient and isinstance(document, BadDocument)):
                yield document
        return
    for number, line in enumerate(block.lines, start=block.first):
        if line.strip():
            yield _read_record(line, f"{block.path}:{number}", text_key)
    if block.failure:
        yield BadDocument(f"{block.path}:{block.first + len(block.lines)}", block.failure)


def _standard_library() -> Iterator[Path]:
    """The .py files of the running Python's standard library, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root):
        if path.suffix == ".py" and not {"site-packages", "dist-packages"} & set(path.parts[len(root.parts) :]):
            yield path


def _expand(name: str) -> Iterator[Path]:
    path = Path(name)
    if path.is_file():
        yield path
        return
    # pathlib's glob would also match hidden names.
    matches = [path] if path.is_dir() else [Path(match) for match in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
    if not matches:
        raise HvdlmError(f"--input {name}: no such file, directory or glob match; check the path")
    for match in matches:
        if match.is_dir():
            yield from _walk(match)
        elif match.is_file():
            yield match


def _walk(root: Path) -> Iterator[Path]:
    """The files below a directory, sorted, without hidden ones. Raises HvdlmError for an unreadable directory."""

    def fail(error: OSError) -> None:
        raise HvdlmError(f"cannot read the input directory {error.filename}: {error.strerror}")

    for directory, subdirectories, files in os.walk(root, onerror=fail):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        yield from (Path(directory, name) for name in sorted(files) if not name.startswith("."))


def _file_block(files: Sequence[Source]) -> FileBlock:
    return FileBlock(tuple(files), sum(file.size for file in files))


def _line_blocks(source: Source) -> Iterator[LineBlock]:
    lines: list[bytes] = []
    first = 1  # number of the first of `lines`
    size = 0  # bytes of `lines`
    block_start = 0  # in the file on disk

    def block(position: int, failure: str = "") -> LineBlock:
        nonlocal lines, first, size, block_start
        made = LineBlock(source.path, first, tuple(lines), position - block_start, failure)
        first += len(lines) + bool(failure)
        lines, size, block_start = [], 0, position
        return made

    try:
        with source.path.open("rb") as raw:
            stream: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if source.path.suffix == ".gz" else raw
            while line := stream.readline(MAX_DOCUMENT_BYTES):
                if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(MAX_DOCUMENT_BYTES)
                    yield block(raw.tell(), _TOO_LONG)
                    continue
                lines.append(line)
                size += len(line)
                if size >= BLOCK_BYTES:
                    yield block(raw.tell())
    except UNREADABLE as error:
        yield block(source.size, f"cannot be read ({error})")
    else:
        yield block(source.size)


_TOO_LONG = f"is longer than {MAX_DOCUMENT_BYTES // 2**20} MiB; split it into several documents"


def _read_file(source: Source) -> str | BadDocument:
    try:
        with gzip.open(source.path) if source.path.suffix == ".gz" else source.path.open("rb") as stream:
            content = stream.read(MAX_DOCUMENT_BYTES + 1)
    except UNREADABLE as error:
        return BadDocument(str(source.path), f"cannot be read ({error})")
    if len(content) > MAX_DOCUMENT_BYTES:
        return BadDocument(str(source.path), _TOO_LONG)
    if (nul := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, nul) + 1
        return BadDocument(f"{source.path}:{line}", "holds a NUL byte, so this is a binary file, not text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return BadDocument(f"{source.path}:{line}", f"is not UTF-8 ({error.reason}); convert the file")
    return text or BadDocument(str(source.path), "is empty")


def _read_record(line: bytes, where: str, text_key: str) -> str | BadDocument:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadDocument(where, f"is not UTF-8 ({error.reason}); convert the file")
    except (ValueError, RecursionError) as error:
        return BadDocument(where, f"is not JSON ({error})")
    if not isinstance(record, dict):
        return BadDocument(where, 'is not a JSON object; each line must be one, as in {"text": "..."}')
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:10])) or "none"
        return BadDocument(where, f"has no key {text_key!r} (its keys: {keys}); name the right one with --text-key")
    text = record[text_key]
    if not isinstance(text, str):
        return BadDocument(where, f"has a {text_key!r} that is no string")
    if "\0" in text:
        return BadDocument(where, "holds a NUL character, so this is binary data, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadDocument(where, "holds half of a surrogate pair, which no UTF-8 text can")
    return text or BadDocument(where, "is empty")
