"""The writing of one shard, a document at a time."""

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
CHUNK_TOKENS = 2**16  # one checksum each; small enough that a random window costs little to read
CHUNK_OFFSETS = 2**13


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Little-endian uint16 where every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class ShardWriter:
    """Context manager that writes `directory/file`; memory holds one chunk, however long the shard.

    `/tokens` and `/doc_offsets` are as the design's "Shards" says. The shard is good only after `finish`.
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
        self._stream = _NeverFailingFile(self._path)
        # libver="latest" checksums HDF5's own metadata too. The cache need hold no more than the chunk being written.
        self._hdf5 = h5py.File(self._stream, "w", libver="latest", rdcc_nbytes=CHUNK_TOKENS * 4)
        self._tokens = _Column(self._hdf5, "tokens", token_dtype(vocab_size), CHUNK_TOKENS)
        self._offsets = _Column(self._hdf5, "doc_offsets", np.dtype("<u8"), CHUNK_OFFSETS)
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

    def append(self, tokens: npt.NDArray[Any], n_bytes: int) -> None:
        """Adds a document: its tokens (n,) with the end of text last, and how many UTF-8 bytes its text has.

        Raises OSError if the file cannot be written.
        """
        self._tokens.append(tokens)
        self._sha256.update(tokens.astype(self._tokens.dtype, copy=False).tobytes())
        self.n_docs += 1
        self._n_tokens += len(tokens)
        self._n_bytes += n_bytes
        self._offsets.append(np.array([self._n_tokens], dtype="<u8"))
        self._stream.check()

    def finish(self) -> ShardRecord:
        """Writes what is held, marks the shard complete and closes it. Raises OSError if it cannot be written."""
        self._tokens.flush()
        self._offsets.flush()
        counts = {"n_tokens": self._n_tokens, "n_docs": self.n_docs, "n_bytes": self._n_bytes}
        sha256 = self._sha256.hexdigest()
        for name, value in (self._attributes | counts | {"tokens_sha256": sha256, "complete": True}).items():
            # Strings of fixed length lie in the checksummed object header. Those of variable length would lie in
            # HDF5's global heap, which has no checksum, and in which one flipped bit can make HDF5 search for ever.
            self._hdf5.attrs[name] = np.bytes_(value, "ascii") if isinstance(value, str) else value
        self._hdf5.close()
        self._stream.check()
        return ShardRecord(file=self._file, size=self._path.stat().st_size, tokens_sha256=sha256, **counts)


class _NeverFailingFile(io.FileIO):
    """What HDF5 writes to. It sees no failure, for after one (a full disk) it cannot close the file, and crashes.

    The first failure is kept for `check`, and from then on nothing more is written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x+")
        self._error: OSError | None = None

    def check(self) -> None:
        """Raises the OSError that has befallen the file, if any."""
        if self._error:
            raise self._error

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest and not self._error:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self._error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0


class _Column:
    """A one-dimensional data set that grows by whole chunks, so that no chunk is read back to be extended."""

    def __init__(self, file: h5py.File, name: str, dtype: np.dtype[Any], chunk: int) -> None:
        self.dtype = dtype
        self._chunk = chunk
        self._held: list[npt.NDArray[Any]] = []
        self._count = 0
        self._data = file.create_dataset(
            name, shape=(0,), maxshape=(None,), chunks=(chunk,), dtype=dtype, fletcher32=True
        )

    def append(self, values: npt.NDArray[Any]) -> None:
        self._held.append(values)
        self._count += len(values)
        if self._count >= self._chunk:
            self._write(self._count - self._count % self._chunk)

    def flush(self) -> None:
        if self._count:
            self._write(self._count)

    def _write(self, count: int) -> None:
        values = np.concatenate(self._held).astype(self.dtype, copy=False)
        start = self._data.shape[0]
        self._data.resize((start + count,))
        self._data[start:] = values[:count]
        self._held = [values[count:].copy()]
        self._count -= count
