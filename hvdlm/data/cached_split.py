"""Splits whose shards are read from copies on a disk of this host, where there are some: `data.cache`."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from hvdlm.data.file_errors import OUT_OF_DESCRIPTORS, TRANSIENT, error_number
from hvdlm.data.manifest import ShardRecord
from hvdlm.data.shard import DataSet, Split
from hvdlm.data.shard_copies import ShardCopies
from hvdlm.errors import HvdlmError

# After which a copy may be as it was
_OF_THE_MOMENT = TRANSIENT | OUT_OF_DESCRIPTORS | {errno.ENOMEM}


class ReadCount(NamedTuple):
    """How often tokens were read, and how often of a copy."""

    reads: int
    hits: int


class CachedSplit(Split):
    """A split that reads a shard's copy as soon as there is one; a copy that is damaged is made again."""

    def __init__(self, directory: Path, records: Sequence[ShardRecord], copies: ShardCopies) -> None:
        """`records`: the split's shards in the manifest of `directory`."""
        super().__init__(directory, records)
        self.count = ReadCount(0, 0)
        self._records, self._copies = records, copies
        self._local = Split(copies.directory, records)

    def will_read(self, shards: Iterable[int]) -> None:
        """Has shards copied before they are read."""
        self._copies.request(self._records[shard].file for shard in shards)

    def _values(self, shard: int, name: str, part: slice) -> npt.NDArray[Any]:
        file = self._records[shard].file
        values = None
        if self._copies.has(file):
            try:
                values = self._local.values(shard, name, part)
            except (OSError, KeyError, RuntimeError) as error:
                self._local.close(shard)
                if error_number(error) not in _OF_THE_MOMENT:
                    self._copies.forget(file, str(error))
        self.will_read([shard])
        self.count = ReadCount(self.count.reads + 1, self.count.hits + (values is not None))
        return super()._values(shard, name, part) if values is None else values


def read_copies(data: DataSet, cache: str) -> None:
    """Lets `data` be read from copies in a directory of `cache`, which holds variables of this host's environment.

    Raises HvdlmError if nothing can be written there.
    """
    for variable in re.findall(r"\$(?:(\w+)|\{(\w+)\})", cache):
        if not os.environ.get("".join(variable)):
            raise HvdlmError(f"data.cache = {cache!r}: {''.join(variable)} is not set here: set it on each host")
    try:
        directory = Path(os.path.expandvars(cache)).expanduser().absolute()
    except RuntimeError:
        raise HvdlmError(f"data.cache = {cache!r} begins with the home of a user who is not here") from None
    manifest = data.manifest
    copies = ShardCopies(data.path, directory / manifest.fingerprint[:16], manifest)
    data.train = CachedSplit(data.path, manifest.train, copies)
    data.validation = CachedSplit(data.path, manifest.validation, copies)
