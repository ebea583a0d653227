"""What a user of `hvdlm predict` asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvdlm.errors import HvdlmError

# The most ranks of a forecast: its time grows with their number
_MOST_RANKS = 16384


@dataclass(frozen=True)
class ForecastOptions:
    """The options of the command; None: what was measured, or a default."""

    ranks: str  # "8..2048" for powers of two times 8, or a list as "8,12,16"
    ranks_per_host: int | None = None
    link: str | None = None  # of each host
    inside_link: str | None = None  # of each rank, to the others of its host
    codecs: Sequence[str] = ()
    preset: str | None = None
    batch_size_per_rank: int | None = None  # sequences in a step
    device: str | None = None
    mfu: float | None = None  # share of its peak that one rank attains
    tokens_per_second: float | None = None  # of one rank
    search: bool = False  # for the fastest layouts
    overrides: Sequence[str] = ()

    @property
    def counts(self) -> list[int]:
        """The numbers of ranks. Raises HvdlmError for none."""
        return parse_counts(self.ranks)


def parse_counts(text: str) -> list[int]:
    """Numbers of ranks: "8..64" is 8, 16, 32, 64. Raises HvdlmError for anything else."""
    first, dots, last = text.partition("..")
    try:
        ends = [int(first), int(last)] if dots else [int(each) for each in text.split(",")]
    except ValueError:
        ends = []
    if not ends or min(ends) < 1 or (dots and ends[0] > ends[1]):
        raise HvdlmError(f"--ranks {text}: give numbers as in 8,16,32, or 8..2048, which doubles")
    if max(ends) > _MOST_RANKS:
        raise HvdlmError(f"--ranks {text}: forecasts go to {_MOST_RANKS:,} ranks")
    if not dots:
        return ends
    return [ends[0] * 2**doubling for doubling in range((ends[1] // ends[0]).bit_length())]
