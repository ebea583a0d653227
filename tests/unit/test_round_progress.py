"""Which rounds end after a rank has died, by what the others tell of them."""

from __future__ import annotations

import pytest
import torch

from hvdlm.strategies.local_steps.round_progress import RoundProgress, rounds_ended

FIRST, SECOND = torch.tensor([1]), torch.tensor([2])
ENDED = RoundProgress(2, False, True, SECOND, began_at=20, delivered=20)
HAS_SUMS = RoundProgress(2, True, True, SECOND, began_at=20, delivered=10)
LACKS_TOTALS = RoundProgress(2, True, True, None, began_at=20, delivered=10)
LACKS_SUMS = RoundProgress(2, True, False, SECOND, began_at=20, delivered=10)
IS_BEHIND = RoundProgress(1, False, True, FIRST, began_at=10, delivered=10)


@pytest.mark.parametrize(
    ("progress", "rounds", "totals", "delivered"),
    [
        ([ENDED, HAS_SUMS, LACKS_TOTALS], 2, SECOND, 20),  # one has passed the barrier, so all have the sums
        ([HAS_SUMS, LACKS_TOTALS], 2, SECOND, 20),  # all have
        ([LACKS_TOTALS, LACKS_TOTALS], 1, None, 10),
        ([HAS_SUMS, LACKS_SUMS], 1, None, 10),
        ([HAS_SUMS, IS_BEHIND], 1, FIRST, 10),
        ([RoundProgress(1, True, True, FIRST, 10, 5), None], 0, None, 5),  # one has not begun its local steps
    ],
)
def test_rounds_that_end(progress, rounds, totals, delivered) -> None:
    assert rounds_ended(progress) == (rounds, totals, delivered)
