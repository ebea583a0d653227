"""Input files: which ones `--input` names, and what they hold."""

from __future__ import annotations

import glob
import gzip
import io
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from hvdlm.data import zstandard
from hvdlm.data.json_records import JsonShape, json_shape
from hvdlm.data.tables import SUFFIXES as TABLES
from hvdlm.data.tables import is_description, require_pyarrow
from hvdlm.errors import HvdlmError

PYTHON_STDLIB = "python-stdlib"

# The last ones are raised for a compressed file that is truncated or damaged
UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, *zstandard.ERRORS)

_JSON_LINES = (".jsonl", ".jsonlines", ".ndjson")


class Holds(Enum):
    """What an input file is made of."""

    TEXT = "one document of text"
    LINES = "a JSON record in each line"
    VALUES = "JSON records in an array, or one after the other"
    OBJECT = "a JSON object, which is a record if it has the key of the text, and text otherwise"
    ROWS = "a table, each row of which is a record"


@dataclass(frozen=True)
class InputFile:
    """An input file. `lenient`: if it is not text, it is skipped silently, not reported as a bad document."""

    path: Path
    size: int  # bytes, as stored on disk
    modified: int  # nanoseconds since the epoch
    lenient: bool = False
    holds: Holds = Holds.TEXT

    @property
    def is_compressed(self) -> bool:
        return _is_compressed(self.path)

    @contextmanager
    def open(self) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
        """The file as it is on disk, whose position tells how far one has read, and its decompressed content.

        Raises one of UNREADABLE, here or at a later read.
        """
        with _open(self.path) as files:
            yield files


@dataclass(frozen=True)
class NoFile:
    """What lies in an input directory but is neither a file nor a directory, such as a pipe, and what it is."""

    path: Path
    kind: str


def find_files(inputs: Sequence[str], option: str = "--input") -> tuple[list[InputFile], list[NoFile]]:
    """The files that `inputs` name, in the order given, and what lies among them but is no file.

    The files of a directory or a glob are sorted; a file named twice counts once. In directories, hidden names are
    skipped and links to directories not followed. What only describes a saved `Dataset` is left out however it is
    named, since a shell may have made its name of a glob.

    Raises HvdlmError for an input that matches no file or is itself none, or a file that cannot be read at all.
    """
    found: dict[Path, InputFile] = {}
    others: list[NoFile] = []
    for name in inputs:
        if not name:
            raise HvdlmError(f"{option} has an empty path among its values; leave it out, or give a path")
        lenient = name == PYTHON_STDLIB
        for path in _standard_library() if lenient else _expand(name, option):
            try:
                status = path.stat()
            except OSError as error:
                raise HvdlmError(f"cannot read the input {path}: {error.strerror}") from None
            if not stat.S_ISREG(status.st_mode):
                others.append(NoFile(path, _kind(status.st_mode)))
                continue
            if path.resolve() not in found and not is_description(path):
                file = InputFile(path, status.st_size, status.st_mtime_ns, lenient, _holds(path))
                found[path.resolve()] = file
    return list(found.values()), others


def _standard_library() -> Iterator[Path]:
    """The .py files of the running Python's standard library, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root):
        if path.suffix == ".py" and not {"site-packages", "dist-packages"} & set(path.parts[len(root.parts) :]):
            yield path


def _expand(name: str, option: str) -> Iterator[Path]:
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except OSError as error:
        raise HvdlmError(f"{option} {name}: {error.strerror}") from None
    if stat.S_ISREG(mode):
        yield path
        return
    if mode and not stat.S_ISDIR(mode):
        raise HvdlmError(
            f"{option} {name} is {_kind(mode)}, which can be read only once and by one process; "
            "write its content to a file first, and give that"
        )
    # pathlib's glob would also match hidden names.
    matches = [path] if mode else [Path(match) for match in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
    if not matches:
        raise HvdlmError(f"{option} {name}: no such file, directory or glob match; check the path")
    for match in matches:
        if match.is_dir():
            yield from _walk(match)
        else:
            yield match


def _walk(root: Path) -> Iterator[Path]:
    """The files below a directory, sorted, without hidden ones. Raises HvdlmError for an unreadable directory."""

    def fail(error: OSError) -> None:
        raise HvdlmError(f"cannot read the input directory {error.filename}: {error.strerror}")

    for directory, subdirectories, files in os.walk(root, onerror=fail):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        yield from (Path(directory, name) for name in sorted(files) if not name.startswith("."))


def _kind(mode: int) -> str:
    """What something is that is neither a file nor a directory."""
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"


def _holds(path: Path) -> Holds:
    """By the file's suffix; a .json file may be anything, so what it begins with decides."""
    suffix = Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
    if path.suffix.lower() == ".zst":
        zstandard.require_zstandard(path)
    if path.suffix.lower() in TABLES:
        require_pyarrow(path)
        return Holds.ROWS
    if suffix in _JSON_LINES:
        return Holds.LINES
    if suffix != ".json":
        return Holds.TEXT
    try:
        with _open(path) as (_, stream):
            shape = json_shape(stream)
    except UNREADABLE:
        return Holds.TEXT  # whoever reads it will say what is wrong
    return {
        JsonShape.LINES: Holds.LINES,
        JsonShape.VALUES: Holds.VALUES,
        JsonShape.OBJECT: Holds.OBJECT,
        JsonShape.OTHER: Holds.TEXT,
    }[shape]


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in (".gz", ".zst")


@contextmanager
def _open(path: Path) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
    with path.open("rb") as raw:
        if path.suffix.lower() == ".gz":
            yield raw, gzip.GzipFile(fileobj=raw)
        elif path.suffix.lower() == ".zst":
            yield raw, zstandard.zstd.ZstdFile(raw)
        else:
            yield raw, raw
