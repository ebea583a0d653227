"""Which rounds end after a rank has died, by what the others tell of them."""

from __future__ import annotations

import pytest
import torch

from hvdlm.strategies.local_steps.round_progress import RoundProgress, rounds_ended

FIRST, SECOND = torch.tensor([1]), torch.tensor([2])
ENDED = RoundProgress(2, False, True, None, SECOND, began_at=20, delivered=20)
HAS_SUMS = RoundProgress(2, True, True, SECOND, FIRST, began_at=20, delivered=10)
LACKS_TOTALS = RoundProgress(2, True, True, None, FIRST, began_at=20, delivered=10)
LACKS_SUMS = RoundProgress(2, True, False, SECOND, FIRST, began_at=20, delivered=10)
IS_BEHIND = RoundProgress(1, False, True, None, FIRST, began_at=10, delivered=10)
IS_AHEAD = RoundProgress(3, True, True, FIRST, SECOND, began_at=30, delivered=20)


@pytest.mark.parametrize(
    ("progress", "rounds", "totals", "delivered"),
    [
        ([ENDED, HAS_SUMS, LACKS_TOTALS], 2, SECOND, 20),  # one has passed the barrier, so all have the sums
        ([HAS_SUMS, LACKS_TOTALS], 2, SECOND, 20),  # all have
        ([IS_AHEAD, LACKS_TOTALS], 2, SECOND, 20),  # it has even begun the next one
        ([LACKS_TOTALS, LACKS_TOTALS], 1, FIRST, 10),
        ([HAS_SUMS, LACKS_SUMS], 1, FIRST, 10),
        ([HAS_SUMS, IS_BEHIND], 1, FIRST, 10),
        ([RoundProgress(1, True, True, FIRST, None, 10, 5), None], 0, None, 5),  # one has not begun its local steps
    ],
)
def test_rounds_that_end(progress, rounds, totals, delivered) -> None:
    assert rounds_ended(progress) == (rounds, totals, delivered)
