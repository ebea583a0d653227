"""How many sequences of a batch each rank computes, where ranks are not equally fast."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=64)
def shares_by_cost(sequences: int, costs: tuple[int, ...]) -> tuple[int, ...]:
    """One sequence or more for each rank, so that the last one is done as soon as possible. `costs`: of a sequence on
    each rank, above 0, in any unit; there are at least as many sequences as ranks.

    Each sequence goes to the rank that will then be done first, of several to the lowest. No other integers do better:
    whoever is last was given its last sequence when every other rank would have been done with it as late or later.
    """
    shares = [1] * len(costs)
    ends = [(2 * cost, rank) for rank, cost in enumerate(costs)]  # with one sequence more
    heapq.heapify(ends)
    for _ in range(sequences - len(costs)):
        end, rank = ends[0]
        shares[rank] += 1
        heapq.heapreplace(ends, (end + costs[rank], rank))
    return tuple(shares)


def seconds_of(shares: Sequence[int], costs: Sequence[float]) -> float:
    """Until the last rank is done with its share, in the unit of the costs."""
    return max(share * cost for share, cost in zip(shares, costs, strict=True))
