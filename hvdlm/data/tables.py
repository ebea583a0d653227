"""Tables: Parquet files, and Arrow files as Hugging Face's datasets writes them. Each row is a document.

Read by pyarrow, which comes with `pip install hvdlm[data]`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.data.file_errors import LFS_POINTER, is_lfs_pointer
from hvdlm.errors import HvdlmError

SUFFIXES = (".parquet", ".arrow", ".feather")

_ROWS = 64  # of a piece of a Parquet file, at most

# What lies beside the Arrow files of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`
_MARKS = ("dataset_info.json", "dataset_dict.json")
_DESCRIPTIONS = (*_MARKS, "state.json")


@dataclass(frozen=True)
class Rows:
    """Some rows of a table. `share`: of the file, up to their end."""

    values: list[Any]  # of the column of texts
    share: float


def require_pyarrow(path: Path) -> None:
    """Raises HvdlmError if `path` cannot be read because pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise HvdlmError(f"{path} is a table, which is read by pyarrow: pip install 'hvdlm[data]'")


def is_description(path: Path) -> bool:
    """Whether this file only describes a saved `Dataset` or `DatasetDict` in its directory."""
    return path.name in _DESCRIPTIONS and any((path.parent / name).exists() for name in _MARKS)


def read_rows(path: Path, column: str) -> Iterator[Rows]:
    """The rows of a table in order, in pieces that fit into memory.

    Raises OSError if the file is damaged, and HvdlmError, to be read after the file's name, if it has no such column or
    is a pointer of Git LFS.
    """
    import pyarrow

    with path.open("rb") as raw:
        if is_lfs_pointer(raw.read(1000)):
            raise HvdlmError(LFS_POINTER)
    try:
        yield from (_parquet if path.suffix.lower() == ".parquet" else _arrow)(path, column)
    except (pyarrow.ArrowException, ValueError, KeyError) as error:  # the latter of odd types and names
        raise OSError(str(error).strip().partition("\n")[0]) from error


def _parquet(path: Path, column: str) -> Iterator[Rows]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        _require_column(file.schema_arrow.names, column)
        total, done = file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            done += batch.num_rows
            yield Rows(_values(batch.column(0)), done / total)


def _arrow(path: Path, column: str) -> Iterator[Rows]:
    """A file of record batches, or a stream of them, which is what datasets writes."""
    import pyarrow

    size = path.stat().st_size
    with path.open("rb") as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        if is_file:
            with pyarrow.ipc.open_file(raw) as file:
                _require_column(file.schema.names, column)
                for number in range(file.num_record_batches):
                    values = _values(file.get_batch(number).column(column))
                    yield Rows(values, (number + 1) / file.num_record_batches)
            return
        with pyarrow.ipc.open_stream(raw) as stream:
            _require_column(stream.schema.names, column)
            for batch in stream:
                yield Rows(_values(batch.column(column)), raw.tell() / size)


def _values(column: Any) -> list[Any]:
    """Of a column of text that is not all UTF-8, which pyarrow does not look at before, the bytes."""
    import pyarrow

    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pyarrow.large_binary()).to_pylist()
    return values


def _require_column(names: list[str], column: str) -> None:
    if column not in names:
        found = ", ".join(map(repr, names[:10])) or "none"
        raise HvdlmError(f"has no column {column!r} (its columns: {found}); name the right one with --text-key")
