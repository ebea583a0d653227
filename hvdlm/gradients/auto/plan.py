"""What codec `auto` decides: the size of buckets and the codec of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class CodecPlan:
    """Buckets of about `bucket_bytes`, and the name of the codec of each, in their order."""

    bucket_bytes: int
    names: list[str]

    def __str__(self) -> str:
        counts = Counter(self.names)
        return " and ".join(f"{name} for {count}" if len(counts) > 1 else name for name, count in counts.items())
