"""Error feedback: what was not delivered at one step is owed, and added to the gradients of the next.

Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes SignSGD",
ICML 2019, algorithm 2. Without it whatever a codec drops is lost for good, and a biased codec trains another model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvdlm.gradients.bucket import Bucket
from hvdlm.gradients.exchange import Exchange


class Residual:
    """What a rank still owes of the gradients of a bucket: should have been delivered, minus was."""

    def __init__(self, bucket: Bucket, is_kept: bool) -> None:
        """`is_kept`: False to forget it, and to see what error feedback is for."""
        self.values = torch.zeros_like(bucket.buffer) if is_kept else None

    def carry_into_(self, gradients: Tensor) -> None:
        """Adds what is owed to `gradients`, which then hold all that should be delivered."""
        if self.values is not None:
            gradients.add_(self.values)

    def keep(self, intended: Tensor, delivered: Callable[[], Tensor]) -> None:
        """Owes the difference from now on; `delivered` is called only if a residual is kept."""
        if self.values is not None:
            torch.sub(intended, delivered(), out=self.values)

    def state(self) -> dict[str, Tensor]:
        return {} if self.values is None else {"residual": self.values}


def reduce_whole_(gradients: Tensor, residual: Tensor, exchange: Exchange) -> None:
    """Delivers the dense sum and all of `residual`, this rank's; bit for bit the dense sum where nothing is owed."""
    is_owing = bool(residual.any())
    if is_owing:
        gradients.add_(residual)
    exchange.all_reduce_(gradients)
    if is_owing and gradients.isfinite().all():
        residual.zero_()
