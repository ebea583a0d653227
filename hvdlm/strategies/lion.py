"""Lion: steps by the sign of a momentum."""

from __future__ import annotations

from typing import Any

import torch

from hvdlm.gradients.codecs.codec import uses_loops
from hvdlm.strategies.update_loops import lion_


class Lion(torch.optim.Optimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2.

    x -= rate * (sign(beta1 m + (1 - beta1) g) + decay x), then m = beta2 m + (1 - beta2) g. The paper takes a third to
    a tenth of AdamW's rate, and three to ten times its decay.
    """

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Of parameters with a gradient; `closure` is not called."""
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            if not parameters:
                continue
            if uses_loops(parameters[0]):
                for each in parameters:
                    lion_(each, self.state[each]["momentum"], group)
                continue
            gradients = [each.grad for each in parameters]
            momenta = [self.state[each]["momentum"] for each in parameters]
            beta1, beta2 = group["betas"]
            updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
