"""The outer optimizer: what the averaged parameters make of the average difference of a round."""

from __future__ import annotations

import torch
from torch import Tensor


class OuterOptimizer:
    """SGD with Nesterov momentum on differences of parameters (Douillard et al., "DiLoCo", arXiv:2311.08105, algorithm
    1, lines 12 and 14).

    With `lr` 1 and `momentum` 0 the outer parameters become the average of all ranks' parameters: local SGD, or
    federated averaging (McMahan et al., AISTATS 2017, algorithm 1).
    """

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr, self.momentum = lr, momentum

    @property
    def sets_average(self) -> bool:
        """Whether the outer parameters become the average itself."""
        return self.lr == 1 and self.momentum == 0

    @torch.no_grad()
    def step_(self, outer: Tensor, velocity: Tensor | None, difference: Tensor) -> None:
        """Moves `outer` along `difference`, the average of parameters minus `outer`, which is overwritten.

        `velocity`: that of the rounds before; None without momentum. All are of one shape.
        """
        if velocity is None:
            outer.add_(difference, alpha=self.lr)
            return
        velocity.mul_(self.momentum).add_(difference)
        outer.add_(difference.add_(velocity, alpha=self.momentum), alpha=self.lr)
