"""Parts of global batches, before and after ranks have died: each sequence is somebody's, and nobody's twice."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.data.rank_parts import RankParts

BATCH, END = 12, 20
ONCE = Counter((batch, index) for batch in range(END) for index in range(BATCH))


def all_of(parts: RankParts, ranks: list[int], batches: range) -> Counter:
    return Counter(each for rank in ranks for batch in batches for each in parts.own(batch, rank))


def test_each_rank_has_its_part_of_a_batch() -> None:
    parts = RankParts(BatchSizes(BATCH), 4)
    assert parts.ranks == [0, 1, 2, 3]
    assert parts.own(7, 1) == [(7, 3), (7, 4), (7, 5)]
    assert all_of(parts, parts.ranks, range(END)) == ONCE


def test_parts_by_what_a_sequence_costs() -> None:
    """Two ranks that take 1 and 2 for each share 12 as 8 and 4; before that batch they did equally."""
    parts = RankParts(BatchSizes(BATCH), 2).shared_by([1, 2], batch=5)
    assert parts.shares(5) == (8, 4)
    assert parts.own(5, 0) == [(5, index) for index in range(8)]
    assert parts.own(6, 1) == [(6, index) for index in range(8, 12)]
    assert all_of(parts, [0, 1], range(5, END)) == Counter(each for each in ONCE if each[0] >= 5)
    assert parts.changes == 1


def test_a_batch_of_fewer_sequences_than_ranks_is_shared_equally() -> None:
    """What would a rank be measured by that has none? Batches 0 to 2 have 2, those after them 12.

    These are done after 8, 6 and 4; with 7, 3 and 2 the last one would not be earlier.
    """
    parts = RankParts(BatchSizes(12, 10, 1, 3), 3).shared_by([1, 2, 4], batch=0)
    assert [parts.shares(batch) for batch in (0, 2, 3)] == [(0, 1, 1), (0, 1, 1), (8, 3, 1)]


def test_who_is_left_keeps_what_sequences_cost() -> None:
    """Ranks 0 and 2 take 1 and 3: 9 and 3 of 12. One that joins has not been measured: all are equal again."""
    parts = RankParts(BatchSizes(BATCH), 3).shared_by([1, 2, 3], batch=4)
    left, _ = parts.regrouped([0, 2], sent=7, batch=7, end=END)
    assert left.shares(7) == (9, 3)
    assert all_of(left, [0, 2], range(7, END)) + all_of(parts, [0, 1, 2], range(4, 7)) == Counter(
        each for each in ONCE if each[0] >= 4
    )
    more, _ = left.regrouped([0, 2, 3], sent=9, batch=9, end=END)
    assert more.shares(9) == (4, 4, 4)


@pytest.mark.parametrize(("size", "by_cost", "shares"), [(2, True, (8, 4)), (2, False, (6, 6)), (3, True, (4, 4, 4))])
def test_a_run_that_is_resumed_keeps_what_sequences_cost(size: int, by_cost: bool, shares: tuple[int, ...]) -> None:
    """On as many ranks, and as long as it is set."""
    saved = json.loads(json.dumps(RankParts(BatchSizes(BATCH), 2).shared_by([10, 20], batch=5).state_dict()))
    again = RankParts(BatchSizes(BATCH), size)
    again.load_state_dict(saved, 8, END, as_saved=size == 2, by_cost=by_cost)
    assert again.shares(8) == shares


def test_others_take_over_from_the_batch_under_way() -> None:
    """As where ranks step together: all that the dead one has computed before is in the model."""
    parts, lost = RankParts(BatchSizes(BATCH), 4).regrouped([0, 1, 3], sent=5, batch=5, end=END)
    assert (parts.ranks, lost) == ([0, 1, 3], 0)
    assert parts.own(4, 2) == [(4, 6), (4, 7), (4, 8)]
    assert parts.own(5, 3) == [(5, 8), (5, 9), (5, 10), (5, 11)]
    assert parts.own(5, 2) == []


def test_what_was_not_sent_is_made_up_for() -> None:
    """Batches 5 and 6 of rank 0, three sequences each, in as many steps: one a rank and step."""
    parts, lost = RankParts(BatchSizes(BATCH), 4).regrouped([1, 2, 3], sent=5, batch=7, end=END)
    assert lost == 0
    assert parts.own(7, 1) == [(7, 0), (7, 1), (7, 2), (7, 3), (5, 0)]
    assert parts.own(8, 3) == [(8, 8), (8, 9), (8, 10), (8, 11), (6, 2)]
    assert parts.own(9, 1) == [(9, 0), (9, 1), (9, 2), (9, 3)]
    assert all_of(parts, [1, 2, 3], range(END)) + all_of(parts, [0], range(5)) == ONCE


def test_who_makes_up_for_it_dies_too() -> None:
    """Before it has, and before it has sent anything since the first death."""
    parts, _ = RankParts(BatchSizes(BATCH), 4).regrouped([1, 2, 3], sent=4, batch=7, end=END)
    parts, lost = parts.regrouped([3], sent=4, batch=8, end=END)
    assert (parts.ranks, lost) == ([3], 0)
    assert all_of(parts, [3], range(END)) + all_of(parts, [0, 1, 2], range(4)) == ONCE


@pytest.mark.parametrize(("batch", "lost"), [(20, 9), (19, 0)])
def test_at_the_end_of_a_run(batch: int, lost: int) -> None:
    """Without a step there is nobody to train on it: 3 sequences of 3 batches. One step takes it all."""
    parts, found = RankParts(BatchSizes(BATCH), 4).regrouped([0, 1, 2], sent=17, batch=batch, end=END)
    assert found == lost
    trained = all_of(parts, [0, 1, 2], range(END)) + all_of(parts, [3], range(17))
    assert sum((ONCE - trained).values()) == lost
    assert not trained - ONCE


def test_a_run_that_is_resumed_makes_up_for_it() -> None:
    parts, _ = RankParts(BatchSizes(BATCH), 4).regrouped([0, 2, 3], sent=5, batch=8, end=END)
    saved = json.loads(json.dumps(parts.state_dict()))
    for size in (3, 2, 5):
        again = RankParts(BatchSizes(BATCH), size)
        again.load_state_dict(saved, 9, END, as_saved=size == 3)
        both = all_of(parts, [0, 2, 3], range(9)) + all_of(parts, [1], range(5))
        assert both + all_of(again, list(range(size)), range(9, END)) == ONCE
        if size == 3:
            own = [[parts.own(k, rank) for k in range(9, END)] for rank in (0, 2, 3)]
            assert [[again.own(k, rank) for k in range(9, END)] for rank in range(3)] == own
            # Another rank dies before anybody has sent what was learned since batch 5
            again, _ = again.regrouped([0, 2], sent=5, batch=11, end=END)
            both = all_of(parts, [0, 3], range(9)) + all_of(parts, [1, 2], range(5))
            assert both + all_of(again, [0, 2], range(9, END)) == ONCE


def test_ranks_that_join_have_their_part() -> None:
    """Numbers that have been given are not given again; the order is that of ranks now."""
    parts, _ = RankParts(BatchSizes(BATCH), 3).regrouped([1, 2], sent=6, batch=6, end=END)
    parts, lost = parts.regrouped([2, 1, parts.known], sent=9, batch=9, end=END)
    assert (parts.ranks, lost, parts.known, parts.changes) == ([2, 1, 3], 0, 4, 2)
    assert parts.own(9, 2) == [(9, 0), (9, 1), (9, 2), (9, 3)]
    assert parts.own(9, 3) == [(9, 8), (9, 9), (9, 10), (9, 11)]
    assert parts.own(8, 3) == []
    assert all_of(parts, [0, 1, 2, 3], range(END)) == ONCE
