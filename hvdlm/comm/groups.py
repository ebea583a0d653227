"""Groups of ranks: who is in which, and how an engine numbers its members."""

from __future__ import annotations

from collections.abc import Sequence


def group_by_color(colors_and_keys: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """The groups of a split: ranks by color, ordered by key, then by rank; `colors_and_keys[r]` is that of rank r."""
    ranks = sorted(range(len(colors_and_keys)), key=lambda rank: (*colors_and_keys[rank], rank))
    colors = sorted({color for color, _ in colors_and_keys})
    return {color: [rank for rank in ranks if colors_and_keys[rank][0] == color] for color in colors}


def group_ranks(members: Sequence[int]) -> list[int]:
    """The rank that an engine gives each member of a group: engines number members in rising order of global rank."""
    return [sorted(members).index(member) for member in members]
