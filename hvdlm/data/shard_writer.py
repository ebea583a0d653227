"""Writes one HDF5 shard, document by document."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hvdlm.data.manifest import ShardRecord

SHARD_FORMAT = "hvdlm-shard"
SHARD_VERSION = 1
CHUNK_TOKENS = 2**16  # each chunk has a checksum; small enough that reading a random window stays cheap
CHUNK_OFFSETS = 2**13


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype of stored tokens: little-endian uint16 if every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class ShardWriter:
    """Context manager that writes `directory/file`; memory holds one chunk, however long the shard.

    The file has two data sets with a Fletcher-32 checksum for each chunk: `/tokens` (n_tokens,), of `token_dtype`, and
    `/doc_offsets` (n_docs + 1,) uint64, the index of the first token of each document and n_tokens at the end. What the
    shard contains is in the attributes of the root group. The shard is complete only after `finish`.
    """

    def __init__(
        self,
        directory: Path,
        file: str,
        shard_index: int,
        num_shards: int,
        *,
        vocab_size: int,
        eos_id: int,
        tokenizer_sha256: str,
    ) -> None:
        self._file = file
        self._path = directory / file
        self._path.parent.mkdir(exist_ok=True)
        self._attributes: dict[str, Any] = {
            "format": SHARD_FORMAT,
            "version": SHARD_VERSION,
            "shard_index": shard_index,
            "num_shards": num_shards,
            "vocab_size": vocab_size,
            "eos_id": eos_id,
            "tokenizer_sha256": tokenizer_sha256,
        }
        self._stream = _DeferredErrorFile(self._path)
        # libver="latest" adds checksums to HDF5's own metadata. The cache only needs to hold the chunk being written.
        self._hdf5 = h5py.File(self._stream, "w", libver="latest", rdcc_nbytes=CHUNK_TOKENS * 4)
        self._tokens = _ChunkedArray(self._hdf5, "tokens", token_dtype(vocab_size), CHUNK_TOKENS)
        self._offsets = _ChunkedArray(self._hdf5, "doc_offsets", np.dtype("<u8"), CHUNK_OFFSETS)
        self._offsets.append(np.zeros(1, dtype="<u8"))
        self._sha256 = hashlib.sha256()
        self.n_docs = 0
        self._n_tokens = 0
        self._n_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hdf5.close()
        self._stream.close()

    def append(self, tokens: npt.NDArray[Any], n_bytes: int, is_continued: bool = False) -> None:
        """Adds a document: `tokens` (n,), ending with the end of text; `n_bytes`: UTF-8 bytes of its text.

        With `is_continued` it does not end yet, and the next call adds more of it.

        Raises OSError if the file cannot be written.
        """
        self._tokens.append(tokens)
        self._sha256.update(tokens.astype(self._tokens.dtype, copy=False).tobytes())
        self._n_tokens += len(tokens)
        self._n_bytes += n_bytes
        if not is_continued:
            self.n_docs += 1
            self._offsets.append(np.array([self._n_tokens], dtype="<u8"))
        self._stream.check()

    def finish(self) -> ShardRecord:
        """Writes what is buffered, marks the shard complete and closes it. Raises OSError if it cannot be written."""
        self._tokens.flush()
        self._offsets.flush()
        counts = {"n_tokens": self._n_tokens, "n_docs": self.n_docs, "n_bytes": self._n_bytes}
        sha256 = self._sha256.hexdigest()
        for name, value in (self._attributes | counts | {"tokens_sha256": sha256, "complete": True}).items():
            # HDF5 stores strings of fixed length in the object header, which has a checksum. It would store strings of
            # variable length in the global heap, which has none, and where a flipped bit can make HDF5 loop forever.
            self._hdf5.attrs[name] = np.bytes_(value, "ascii") if isinstance(value, str) else value
        self._hdf5.close()
        self._stream.check()
        return ShardRecord(file=self._file, size=self._path.stat().st_size, tokens_sha256=sha256, **counts)


class _DeferredErrorFile(io.FileIO):
    """The file that HDF5 writes to; it hides write errors from HDF5 and raises the first of them in `check`.

    After an error, such as a full disk, HDF5 could not close the file and would crash. Nothing is written after it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x+")
        self._error: OSError | None = None

    def check(self) -> None:
        """Raises the first OSError of a write, if there was one."""
        if self._error:
            raise self._error

    def write(self, data: Any) -> int:
        unwritten = memoryview(data).cast("B")
        size = len(unwritten)
        while unwritten and not self._error:
            try:
                unwritten = unwritten[super().write(unwritten) :]
            except OSError as error:
                self._error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0


class _ChunkedArray:
    """A growing one-dimensional HDF5 data set, written in whole chunks so that none is read back to be extended."""

    def __init__(self, file: h5py.File, name: str, dtype: np.dtype[Any], chunk: int) -> None:
        self.dtype = dtype
        self._chunk = chunk
        self._buffered: list[npt.NDArray[Any]] = []
        self._count = 0
        self._data = file.create_dataset(
            name, shape=(0,), maxshape=(None,), chunks=(chunk,), dtype=dtype, fletcher32=True
        )

    def append(self, values: npt.NDArray[Any]) -> None:
        self._buffered.append(values)
        self._count += len(values)
        if self._count >= self._chunk:
            self._write(self._count - self._count % self._chunk)

    def flush(self) -> None:
        if self._count:
            self._write(self._count)

    def _write(self, count: int) -> None:
        values = np.concatenate(self._buffered).astype(self.dtype, copy=False)
        start = self._data.shape[0]
        self._data.resize((start + count,))
        self._data[start:] = values[:count]
        self._buffered = [values[count:].copy()]
        self._count -= count
