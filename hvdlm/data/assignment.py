"""Assigns documents to shards by a hash of their bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

VALIDATION = -1  # the shard number of the validation split


@dataclass(frozen=True)
class ShardAssignment:
    """Assigns each document to a shard by a keyed hash of its bytes, so that equal documents share a shard.

    Attributes:
        seed: key of the hash.
        validation: expected fraction of the distinct documents that go to validation, at least 0 and below 1.
        shards: number of training shards, among which the other documents are divided.
    """

    seed: int
    validation: float
    shards: int

    def shard(self, content: bytes) -> int:
        """The training shard of a document with these UTF-8 bytes, or VALIDATION."""
        digest = self._digest(content)
        if int.from_bytes(digest[:8], "big") < self.validation * 2.0**64:
            return VALIDATION
        return int.from_bytes(digest[8:16], "big") % self.shards

    def sort_key(self, content: bytes) -> int:
        """A number below 2**64 that sorts distinct documents in random order, independent of their shards."""
        return int.from_bytes(self._digest(content)[16:], "big")

    def _digest(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=24, key=str(self.seed).encode()).digest()
