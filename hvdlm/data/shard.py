"""Opens a data set for reading: a training and a validation split of HDF5 shards, with integrity checks."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from hvdlm.data.file_errors import OUT_OF_DESCRIPTORS, TRANSIENT, error_number, unreadable
from hvdlm.data.manifest import TOKENIZER, Manifest, ShardRecord
from hvdlm.data.shard_writer import CHUNK_TOKENS, SHARD_FORMAT, SHARD_VERSION
from hvdlm.errors import HvdlmError

logger = logging.getLogger(__name__)

# Cache of verified chunks, divided among the open shards of a split; a data set that fits in it is checked only once.
CACHE_BYTES = 64 * 2**20
CHUNK_BYTES = CHUNK_TOKENS * 4
# More than that would not have a chunk each. Fewer where the process may not have many files open.
OPEN_SHARDS = CACHE_BYTES // CHUNK_BYTES
BLOCK_TOKENS = 2**22  # read at a time when a whole shard is read

# How often a shard is read before an error that may pass ends the job, and the seconds between.
ATTEMPTS = 4
PAUSE = 1.0


@dataclass(frozen=True)
class Shard:
    """One file of a split, as the manifest describes it."""

    path: Path
    size: int  # bytes of the file
    n_tokens: int  # end-of-text tokens included
    n_docs: int
    n_bytes: int  # UTF-8 bytes of the documents
    tokens_sha256: str


class Split:
    """The shards of the training or the validation split.

    A file is opened at its first read, and again in each forked process: HDF5 handles do not survive a fork. Of many
    shards those that were read last stay open, at most OPEN_SHARDS and a quarter of the files that a process may open.
    """

    def __init__(self, directory: Path, records: Sequence[ShardRecord]) -> None:
        """`records`: the split's shards in the manifest of `directory`."""
        self.shards = tuple(Shard(directory / r.file, **r.model_dump(exclude={"file"})) for r in records)
        self._directory = directory
        self._files: dict[int, h5py.File] = {}  # by shard, the one that was read last at the end
        self._process = os.getpid()

    def read(self, shard: int, start: int, count: int) -> npt.NDArray[Any]:
        """Tokens `start` to `start + count` of a shard: (count,), uint16 or uint32 as stored.

        Raises HvdlmError if the file cannot be read or a checksum fails, IndexError beyond its end.
        """
        info = self.shards[shard]
        if not 0 <= start <= start + count <= info.n_tokens:
            raise IndexError(f"tokens {start} to {start + count} of {info.n_tokens} in {info.path}")
        try:
            return self._values(shard, "tokens", slice(start, start + count))
        except (OSError, KeyError, RuntimeError) as error:
            raise self._read_error(shard, error, (start, count)) from None

    def document_offsets(self, shard: int) -> npt.NDArray[np.uint64]:
        """The index of the first token of each document of a shard, and n_tokens at the end: (n_docs + 1,) uint64.

        Raises HvdlmError if the file cannot be read or a checksum fails.
        """
        try:
            return self._values(shard, "doc_offsets", slice(None))
        except (OSError, KeyError, RuntimeError) as error:
            raise self._read_error(shard, error) from None

    def blocks(self, shard: int, overlap: int = 0) -> Iterator[npt.NDArray[Any]]:
        """A whole shard in order, in blocks of bounded size; each block repeats the `overlap` tokens before it."""
        n_tokens = self.shards[shard].n_tokens
        for start in range(0, n_tokens, BLOCK_TOKENS):
            begin = max(start - overlap, 0)
            yield self.read(shard, begin, min(start + BLOCK_TOKENS, n_tokens) - begin)

    def _values(self, shard: int, name: str, part: slice) -> npt.NDArray[Any]:
        """A part of an HDF5 data set of a shard; after an error that may pass, it is opened and read again."""
        for _ in range(ATTEMPTS - 1):
            try:
                return self.values(shard, name, part)
            except (OSError, KeyError, RuntimeError) as error:
                number = error_number(error)
                if number not in TRANSIENT:
                    raise
                logger.warning("%s: %s; trying again", self.shards[shard].path, os.strerror(number))
            self.close(shard)
            time.sleep(PAUSE)
        return self.values(shard, name, part)

    def values(self, shard: int, name: str, part: slice) -> npt.NDArray[Any]:
        """A part of an HDF5 data set of a shard; raises OSError, KeyError or RuntimeError, as h5py does."""
        values: npt.NDArray[Any] = self._file(shard)[name][part]
        return values

    def close(self, shard: int) -> None:
        """Closes a shard's file, which is opened again by the next read."""
        file = self._files.pop(shard, None)
        if file is not None:
            with contextlib.suppress(OSError, RuntimeError):  # its descriptor may be what does not work
                file.close()

    def _file(self, shard: int) -> h5py.File:
        if self._process != os.getpid():
            self._files, self._process = {}, os.getpid()
        file = self._files.pop(shard, None) or self._open(shard)
        self._files[shard] = file
        return file

    def _open(self, shard: int) -> h5py.File:
        most = _most_open_shards()
        while len(self._files) >= most:
            self.close(next(iter(self._files)))
        cache = max(CACHE_BYTES // min(len(self.shards), most), CHUNK_BYTES)
        while True:
            try:
                return _open(self.shards[shard].path, rdcc_nbytes=cache)
            except OSError as error:
                if error_number(error) not in OUT_OF_DESCRIPTORS or not self._files:
                    raise
                # Something else in this process, or on this host, has more files open than there is room for
                for least_used in list(self._files)[: len(self._files) // 2 + 1]:
                    self.close(least_used)

    def _read_error(self, shard: int, error: Exception, tokens: tuple[int, int] | None = None) -> HvdlmError:
        """The error of a shard that could not be read: at `tokens`, their start and count, or at its offsets."""
        path = self.shards[shard].path
        obstacle = unreadable(path, error)
        if obstacle is not None:
            return obstacle
        where = f"chunk {self._bad_chunk(shard, *tokens)} of its tokens" if tokens else "its document offsets"
        return HvdlmError(
            f"{path} cannot be read at {where} ({error}); see how much is damaged with "
            f"`hvdlm inspect {self._directory} --verify`, and prepare the data set again"
        )

    def _bad_chunk(self, shard: int, start: int, count: int) -> int:
        """The number of the first chunk in this range of tokens that cannot be read."""
        first, last = start // CHUNK_TOKENS, (start + count - 1) // CHUNK_TOKENS
        for chunk in range(first, last):
            try:
                self._file(shard)["tokens"][chunk * CHUNK_TOKENS]
            except (OSError, KeyError, RuntimeError):
                return chunk
        return last


class DataSet:
    """A directory that `hvdlm prepare` wrote.

    Opening it checks the manifest, and the size and attributes of every shard, but reads no tokens; checksums are
    verified when tokens are read.

    Attributes:
        fingerprint: SHA-256 (hex) over all tokens and the tokenizer.
        vocab_size, eos_id: of the tokenizer.
        tokenizer_path: the data set's `tokenizer.json`.
        manifest: its shards as they were written.
        train, validation: the two splits; validation has no shards if the data set was prepared without it.
        sources: those that have weights, in the order of their shards; none where all are drawn from by what they hold.
        validates_sources: whether each of several sources has a shard of the validation split, in the same order.
    """

    def __init__(self, path: Path) -> None:
        """Raises HvdlmError if `path` is not a data set, or is unfinished, damaged, or has shards of another one."""
        self.path = path
        self.manifest = manifest = Manifest.load(path)
        for shards in (manifest.train, manifest.validation):
            for index in range(len(shards)):
                check_shard(path, manifest, shards, index)
        self.fingerprint = manifest.fingerprint
        self.vocab_size = manifest.vocab_size
        self.eos_id = manifest.eos_id
        self.tokenizer_path = path / TOKENIZER
        if not self.tokenizer_path.is_file():
            raise HvdlmError(f"{self.tokenizer_path} is missing; prepare the data set again")
        self.train = Split(path, manifest.train)
        self.validation = Split(path, manifest.validation)
        self.sources = tuple(manifest.sources)
        self.validates_sources = 1 < len(manifest.validation) == len(manifest.sources)


def check_shard(directory: Path, manifest: Manifest, shards: list[ShardRecord], index: int) -> None:
    """Compares the size and attributes of a shard with the manifest. Raises HvdlmError where they differ."""
    record = shards[index]
    path = directory / record.file
    again = f"restore it, or prepare {directory} again"
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise HvdlmError(f"the shard {path} is missing ({error.strerror}); {again}") from None
    except OSError as error:
        raise unreadable(path, error) or HvdlmError(f"{path} cannot be read: {error.strerror}") from None
    if size != record.size:
        raise HvdlmError(f"{path} has {size:,} bytes where the manifest says {record.size:,}; {again}")
    try:
        with _open(path) as file:
            found = {name: _plain(value) for name, value in file.attrs.items()}
            lengths = file["tokens"].shape[0], file["doc_offsets"].shape[0]
    except (OSError, KeyError, RuntimeError) as error:
        raise unreadable(path, error) or HvdlmError(f"{path} is damaged ({error}); {again}") from None
    if not found.get("complete"):
        raise HvdlmError(f"{path} is unfinished: it is not marked complete; {again}")
    if lengths != (record.n_tokens, record.n_docs + 1):
        raise HvdlmError(f"{path} has {lengths[0]:,} tokens where the manifest says {record.n_tokens:,}; {again}")
    if (found.get("format"), found.get("version")) != (SHARD_FORMAT, SHARD_VERSION):
        raise HvdlmError(f"{path} is not a shard of format version {SHARD_VERSION}; {again}")
    expected = {
        "shard_index": index,
        "num_shards": len(shards),
        "vocab_size": manifest.vocab_size,
        "eos_id": manifest.eos_id,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        **record.model_dump(exclude={"file", "size"}),
    }
    for name, value in expected.items():
        if found.get(name) != value:
            raise HvdlmError(
                f"{path} belongs elsewhere: its {name} is {found.get(name)} where the manifest says {value}, "
                f"so shards were swapped or come from another data set; {again}"
            )


def check_contents(directory: Path, record: ShardRecord, between: Callable[[], None] = lambda: None) -> None:
    """Reads a whole shard, and calls `between` before each block of it.

    Raises HvdlmError if its tokens or document offsets are not those that were written.
    """
    split = Split(directory, [record])
    sha256 = hashlib.sha256()
    for block in split.blocks(0):
        between()
        sha256.update(block.tobytes())
    if sha256.hexdigest() != record.tokens_sha256:
        raise HvdlmError(f"{directory / record.file} has other tokens than were written")
    offsets = split.document_offsets(0)
    split.close(0)
    if offsets[0] != 0 or offsets[-1] != record.n_tokens or (offsets[1:] <= offsets[:-1]).any():
        raise HvdlmError(f"{directory / record.file} has document offsets that do not fit its tokens")


def _most_open_shards() -> int:
    """How many shards a split may have open: the rest of a process's files are sockets to other ranks and the like."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OPEN_SHARDS if limit == resource.RLIM_INFINITY else max(1, min(OPEN_SHARDS, limit // 4))


def _open(path: Path, **options: int) -> h5py.File:
    # Complete shards are never written again, and many cluster file systems cannot lock.
    return h5py.File(path, "r", locking=False, **options)


def _plain(attribute: Any) -> Any:
    """An attribute as a Python value."""
    value = attribute.item() if isinstance(attribute, np.generic) else attribute
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value
