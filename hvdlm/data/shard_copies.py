"""Copies of shards on a disk of this host, which all ranks here share, of any number of jobs."""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hvdlm.data.file_errors import UnreadableFileError
from hvdlm.data.manifest import Manifest, ShardRecord
from hvdlm.data.shard import check_contents, check_shard
from hvdlm.data.staging import make_durable
from hvdlm.errors import HvdlmError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**20  # copied at a time
PAUSE = 0.2  # seconds after which it is seen whether others have made a copy
_SECONDS_TO_END = 5.0
_COPIES_OF_A_SHARD = 2  # after which a disk that damages them is no longer used

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class _Closed(Exception):
    """The thread is to end."""


class _Place(NamedTuple):
    """A shard in the manifest."""

    shards: list[ShardRecord]
    number: int

    @property
    def record(self) -> ShardRecord:
        return self.shards[self.number]


class ShardCopies:
    """Copies shards that are asked for, one after the other, in a thread.

    A copy is written under another name and locked by who writes it, so that each is written once, whoever asks; a
    process that is killed loses its lock. It gets its name when it is whole, on the disk, and has the tokens that the
    manifest says. Copies of before are taken if size and attributes are right; each read checks its part.

    Where one cannot be made, that is said, and shards are read from where they were copied from.
    """

    def __init__(self, source: Path, directory: Path, manifest: Manifest) -> None:
        """`directory`: of copies of this data set, of which another's do not lie there. It is made.

        Raises HvdlmError if nothing can be written there.
        """
        self.directory = directory
        self._source, self._manifest = source, manifest
        self._places = {
            record.file: _Place(shards, index)
            for shards in (manifest.train, manifest.validation)
            for index, record in enumerate(shards)
        }
        self._wanted: dict[str, None] = {}  # files that are to be seen to, in order
        self._known: set[str] = set()  # those that have been asked for
        self._copied: dict[str, int] = {}  # the inode of each whole copy
        self._failures: Counter[str] = Counter()
        self._is_full = False
        self._changed = threading.Condition()
        self._is_closed = False
        try:
            for file in self._places:
                (directory / file).parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as trial:
                fcntl.flock(trial, fcntl.LOCK_EX)
        except OSError as error:
            raise HvdlmError(
                f"data.cache: nothing can be written to {directory} ({error.strerror}); name a directory on a disk of "
                "each host, or leave data.cache empty"
            ) from None
        self._thread = threading.Thread(target=self._copy_all, name="hvdlm-shard-copies", daemon=True)
        self._thread.start()
        self.request(file for file in self._places if (directory / file).exists())
        atexit.register(self.close)  # an interpreter that ends does not wait for a thread that holds h5py's lock

    def request(self, files: Iterable[str]) -> None:
        """Has these shards copied, after those that were asked for before."""
        with self._changed:
            new = [file for file in files if file not in self._known]
            if new:
                self._known.update(new)
                self._wanted.update(dict.fromkeys(new))
                self._changed.notify()

    def has(self, file: str) -> bool:
        """Whether a shard's copy is whole."""
        return file in self._copied

    def forget(self, file: str, why: str) -> None:
        """Removes a copy that cannot be read, and has the shard copied again, unless that has been done before."""
        with self._changed:
            inode, copy = self._copied.pop(file, None), self.directory / file
            self._failures[file] += 1
            is_last = self._failures[file] == _COPIES_OF_A_SHARD
            then = "it is not used any more" if is_last else f"it is made again from {self._source / file}"
            logger.warning("the copy %s cannot be read (%s): %s", copy, why, then)
            with suppress(OSError):
                if copy.stat().st_ino == inode:  # or another process has made it again
                    copy.unlink()
            if not is_last:
                self._known.discard(file)
                self.request([file])

    def close(self) -> None:
        """Ends the thread, and the copy under way. Further calls do nothing."""
        atexit.unregister(self.close)
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(_SECONDS_TO_END)  # it may wait for a file server that does not answer

    def _copy_all(self) -> None:
        busy = 0  # in a row
        while True:
            with self._changed:
                if busy and busy >= len(self._wanted):
                    self._changed.wait(PAUSE)
                    busy = 0
                while not self._wanted and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                file = next(iter(self._wanted))
                del self._wanted[file]
            if self._provide(file):
                busy = 0
                continue
            busy += 1
            with self._changed:
                self._wanted[file] = None

    def _provide(self, file: str) -> bool:
        """Sees to the copy of a shard; returns False if another process is making it."""
        source = self._source / file
        try:
            if not self._take(file):
                with _locked(self.directory / f"{file}.partial") as is_ours:
                    if not is_ours:
                        return False
                    if not self._take(file) and not self._is_full:
                        self._copy(file)
        except _Closed:
            pass
        except OSError as error:
            if error.errno not in _FULL:
                logger.warning("%s is not copied to %s (%s), and is read where it is", source, self.directory, error)
            elif not self._is_full:
                self._is_full = True
                said = "data.cache: the disk of %s is full; shards that are not there yet are read from %s"
                logger.warning(said, self.directory, self._source)
        except HvdlmError as error:
            if isinstance(error, UnreadableFileError):
                logger.warning("%s is not copied to %s: %s", source, self.directory, error)
            else:
                said = "%s does not hold what its manifest says, is not copied to %s, and is read where it is"
                logger.warning(said, source, self.directory)
        return True

    def _take(self, file: str) -> bool:
        """Whether there is a whole copy, which then is read."""
        try:
            check_shard(self.directory, self._manifest, *self._places[file])
            self._copied[file] = (self.directory / file).stat().st_ino
        except (HvdlmError, OSError):
            return False
        return True

    def _copy(self, file: str) -> None:
        """Under another name, which nobody else writes now, and then under its own."""
        record, copy = self._places[file].record, self.directory / file
        partial = self.directory / f"{file}.partial"
        with (self._source / file).open("rb", buffering=0) as source, partial.open("r+b") as target:
            target.truncate(0)
            os.posix_fallocate(target.fileno(), 0, max(record.size, 1))  # a disk without room for it is not filled up
            while block := source.read(BLOCK_BYTES):
                self._check_open()
                target.write(block)
            target.truncate()
        check_contents(self.directory, record.model_copy(update={"file": f"{file}.partial"}), self._check_open)
        make_durable(partial)
        inode = partial.stat().st_ino
        partial.rename(copy)
        make_durable(copy.parent)
        self._copied[file] = inode

    def _check_open(self) -> None:
        if self._is_closed:
            raise _Closed


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process alone may write a file, which is made, and removed at the end if it still has its name."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        if not _is_at(path, file):  # another has finished it meanwhile
            yield False
            return
        try:
            yield True
        finally:
            if _is_at(path, file):
                path.unlink()


def _is_at(path: Path, file: BinaryIO) -> bool:
    with suppress(FileNotFoundError):
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    return False
