"""After a rank has died: which rounds of a fragment end on all that are left, and what was learned by then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class RoundProgress(NamedTuple):
    """How far a rank has come with the rounds of a fragment."""

    rounds: int  # begun
    is_under_way: bool  # the last of them
    has_sums: bool  # of that one
    totals: Tensor | None  # of that one, once they have arrived
    ended_totals: Tensor | None  # of the last one that has ended
    began_at: int  # the step after which the last one began
    delivered: int  # the step after which the last one that has ended began


class RoundsEnded(NamedTuple):
    """What the ranks that are left make of their progress, equal on all of them."""

    rounds: int  # that have ended on some rank, or can end on all
    totals: Tensor | None  # of the last of these
    delivered: int  # the step after which it began


def rounds_ended(progress: Sequence[RoundProgress | None]) -> RoundsEnded:
    """By the progress of each rank; None: it has not begun its local steps.

    A rank ends a round only after a barrier that each rank enters when it has the sums. So if one has ended it, all
    have the sums. If nobody has, but all have the sums, it can end as well: what the dead rank has sent is in them.
    """
    told = [each for each in progress if each is not None]
    rounds = max(each.rounds - each.is_under_way for each in told)
    totals = next((each.ended_totals for each in told if each.rounds - each.is_under_way == rounds), None)
    have_sums = all(each is not None and each.is_under_way and each.has_sums for each in progress)
    arrived = next((each.totals for each in told if each.totals is not None), None)
    if have_sums and len({each.rounds for each in told}) == 1 and arrived is not None:
        rounds, totals = rounds + 1, arrived
    delivered = max(each.began_at if each.rounds == rounds else each.delivered for each in told)
    return RoundsEnded(rounds, totals, delivered)
