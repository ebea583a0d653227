"""Which sequences of the global batches each rank trains on, also after some ranks have died."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.data.poisson import PoissonBatches
from hvdlm.data.sampler import rank_part
from hvdlm.data.shares import shares_by_cost

Sequences = list[tuple[int, int]]  # the number of a global batch, and an index in it


class _Members(NamedTuple):
    """Which ranks share global batches."""

    first: int  # the first of these batches
    ranks: list[int]
    costs: tuple[int, ...] = ()  # of a sequence on each of them, where they share by that


class RankParts:
    """Ranks share each global batch equally, or by what a sequence costs each; one that has died leaves its part to the
    others, one that joins has its own.

    Ranks have numbers that stay when others die or join. Where each rank trains on its own between two averages, what a
    dead rank has trained on since the last one is lost with it: the others train on these sequences again, beside their
    own.
    """

    def __init__(self, batch_sizes: BatchSizes | PoissonBatches, ranks: int) -> None:
        """`ranks`: as many as there are at the start."""
        self.batch_sizes = batch_sizes
        self.known = ranks  # numbers that have been given
        self.changes = 0
        self._members = [_Members(0, list(range(ranks)))]  # the last batches first
        self._made_up: dict[int, dict[int, Sequences]] = {}  # by batch and rank: sequences of earlier batches

    @property
    def ranks(self) -> list[int]:
        """The numbers of those that there are now, in their order."""
        return self._members[0].ranks

    def own(self, batch: int, rank: int) -> Sequences:
        """What a rank trains on in the step of a global batch: its part of it, then what it makes up for."""
        ranks = self._members_at(batch).ranks
        if rank not in ranks:
            return []
        part = [(batch, index) for index in self._part(batch, ranks.index(rank))]
        return part + self._made_up.get(batch, {}).get(rank, [])

    def shares(self, batch: int) -> tuple[int, ...]:
        """How many sequences of a batch each of its ranks has, in their order."""
        return tuple(len(self._part(batch, place)) for place in range(len(self._members_at(batch).ranks)))

    def _part(self, batch: int, place: int) -> range:
        """The indices of the rank in that place among those that share a batch."""
        _, ranks, costs = self._members_at(batch)
        if isinstance(self.batch_sizes, PoissonBatches) and self.batch_sizes.fixed_parts:
            return self.batch_sizes.part(batch, place, len(ranks))
        size = self.batch_sizes.size(batch)
        if not costs or size < len(ranks):
            return rank_part(size, place, len(ranks))
        shares = shares_by_cost(size, costs)
        start = sum(shares[:place])
        return range(start, start + shares[place])

    def _members_at(self, batch: int) -> _Members:
        return next(each for each in self._members if each.first <= batch)

    def shared_by(self, costs: Sequence[int], batch: int) -> RankParts:
        """Parts of the same ranks by what a sequence costs each of them, from `batch` on; of none before."""
        parts = copy.deepcopy(self)
        parts._members, parts.changes = [_Members(batch, list(self.ranks), tuple(costs))], self.changes + 1
        return parts

    def most(self, batch: int) -> int:
        """Sequences of the rank that has most of a batch."""
        return max(len(self.own(batch, rank)) for rank in self.ranks)

    def regrouped(self, ranks: Sequence[int], sent: int, batch: int, end: int) -> tuple[RankParts, int]:
        """Parts of these ranks alone, from `batch` on; and how many sequences are lost for good.

        `sent`: the first batch of which the others have not got what those have learned that are gone. Their sequences
        from there to `batch` are dealt out over as many steps as that were, but none after batch `end` - 1.
        """
        dead = [rank for rank in self.ranks if rank not in ranks]
        missing = [each for k in range(sent, batch) for rank in dead for each in self.own(k, rank)]
        parts = copy.deepcopy(self)
        for _, by_rank in sorted((step, each) for step, each in parts._made_up.items() if step >= batch):
            missing += [each for rank in dead for each in by_rank.pop(rank, [])]
        known = dict(zip(self.ranks, self._members[0].costs, strict=False))
        costs = tuple(known[rank] for rank in ranks) if known.keys() >= set(ranks) else ()
        parts._members = [_Members(batch, list(ranks), costs), *(each for each in parts._members if each.first < batch)]
        parts.known, parts.changes = max(self.known, *(rank + 1 for rank in ranks)), self.changes + 1
        return parts, parts._deal(missing, batch, min(end - batch, max(1, batch - sent)))

    def _deal(self, sequences: Sequence[tuple[int, int]], first: int, steps: int) -> int:
        """Deals out sequences over `steps` steps from batch `first` on; returns how many are left, without steps."""
        if steps <= 0:
            return len(sequences)
        for step in range(steps):
            piece = [sequences[index] for index in rank_part(len(sequences), step, steps)]
            by_rank = self._made_up.setdefault(first + step, {})
            for index, rank in enumerate(self.ranks):
                own = [piece[each] for each in rank_part(len(piece), index, len(self.ranks))]
                by_rank[rank] = by_rank.get(rank, []) + own
        return 0

    def state_dict(self) -> dict[str, Any]:
        """With numbers as where a run begins: those of the ranks that there are now come first."""
        gone = sorted({rank for each in self._members for rank in each.ranks} - set(self.ranks))
        number = {rank: place for place, rank in enumerate([*self.ranks, *gone])}
        made_up = [
            (step, number[rank], sequences)
            for step, by_rank in sorted(self._made_up.items())
            for rank, sequences in by_rank.items()
            if sequences
        ]
        members = [(each.first, [number[rank] for rank in each.ranks], each.costs) for each in self._members]
        return {"members": members, "made_up": made_up}

    def load_state_dict(
        self, state: Mapping[str, Any], batch: int, end: int, as_saved: bool, by_cost: bool = False
    ) -> None:
        """Restores it where a run goes on, at `batch`, with what sequences cost only if `by_cost`. If there are not as
        many ranks as there were, only what is still to be made up for, which is dealt out anew.
        """
        made_up = [(step, rank, [(k, index) for k, index in each]) for step, rank, each in state["made_up"]]
        if not as_saved:
            still = [(step, each) for step, _, each in made_up if step >= batch]
            steps = min(len({step for step, _ in still}), end - batch)
            self._deal([sequence for _, each in still for sequence in each], batch, steps)
            return
        self._members = [
            _Members(first, list(ranks), tuple(*costs) if by_cost else ()) for first, ranks, *costs in state["members"]
        ]
        self.known = 1 + max(rank for each in self._members for rank in each.ranks)
        by_step: dict[int, dict[int, Sequences]] = defaultdict(dict)
        for step, rank, sequences in made_up:
            by_step[step][rank] = sequences
        self._made_up = dict(by_step)
