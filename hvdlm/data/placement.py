"""Which shard a document belongs to: a pure function of its bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

VALIDATION = -1


@dataclass(frozen=True)
class Placement:
    """Splits documents by a keyed hash, so that equal documents always land together.

    Attributes:
        seed: key of the hash.
        validation: expected fraction of distinct documents that go to validation.
        shards: training shards that share the others.
    """

    seed: int
    validation: float
    shards: int

    def shard(self, content: bytes) -> int:
        """The training shard of a document of these UTF-8 bytes, or VALIDATION."""
        digest = self._digest(content)
        if int.from_bytes(digest[:8], "big") < self.validation * 2.0**64:
            return VALIDATION
        return int.from_bytes(digest[8:16], "big") % self.shards

    def rank(self, content: bytes) -> int:
        """A number below 2**64 that puts distinct documents in random order, independent of their shards."""
        return int.from_bytes(self._digest(content)[16:], "big")

    def _digest(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=24, key=str(self.seed).encode()).digest()
