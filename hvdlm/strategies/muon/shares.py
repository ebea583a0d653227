"""Which rank orthogonalises which matrix, and in which round."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from hvdlm.strategies.muon.newton_schulz import flops

# Bytes of updates of all ranks that travel at once, while the next ones are made
_ROUND_BYTES = 32 * 2**20

_UPDATE_BYTES = 2  # of a number: bfloat16


def deal_out_in_rounds(shapes: Sequence[tuple[int, ...]], ranks: int) -> list[list[list[int]]]:
    """Which matrices of these shapes each rank orthogonalises in each round: `[round][rank]`, of indices."""
    shares = deal_out([flops(*shape) for shape in shapes], ranks)
    return in_rounds(shares, [_UPDATE_BYTES * rows * columns for rows, columns in shapes], _ROUND_BYTES)


def deal_out(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """For each rank the indices of its matrices, which cost about as much on each.

    The most expensive matrix first, each to the rank that has least so far (Graham, SIAM J. Appl. Math. 1969: the most
    loaded rank has at most 4/3 of what it has in the best division). Ranks may have none.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return shares


def in_rounds(shares: Sequence[Sequence[int]], sizes: Sequence[int], limit: int) -> list[list[list[int]]]:
    """Divides shares into rounds, in each of which a rank has some of its matrices: `[round][rank]`, of indices.

    A round takes the next matrix of every rank, and goes on until its `sizes` together reach `limit`.
    """
    rounds: list[list[list[int]]] = []
    filled = limit
    for turn in zip_longest(*shares):
        if filled >= limit:
            rounds.append([[] for _ in shares])
            filled = 0
        for rank, index in enumerate(turn):
            if index is not None:
                rounds[-1][rank].append(index)
                filled += sizes[index]
    return rounds
