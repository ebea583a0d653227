"""AdamW whose second moments may be frozen, as in 1-bit Adam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvdlm.strategies.update_loops import adam_, are_used, step_each

# Parameters whose square roots of second moments a frozen step holds at once
_RUN_BYTES = 32 * 2**20


class FrozenVarianceAdamW(torch.optim.AdamW):
    """AdamW whose second moments are not updated after some step, as in 1-bit Adam.

    Codecs that send few elements deliver the gradients of many steps at once and nothing in between. The second moment
    of that is far larger than that of the gradients, so AdamW's steps become too small. With a second moment of dense
    gradients, steps are linear in what is delivered, and its delay does not matter (Tang et al., "1-bit Adam", ICML
    2021, section 3.3).
    """

    def __init__(self, parameters: Any, freeze_variance_after: int = 0, **settings: Any) -> None:
        """`freeze_variance_after`: steps in which second moments are updated; 0: all."""
        super().__init__(parameters, **settings)
        self._freeze_variance_after = freeze_variance_after
        self.freezes_variance = bool(freeze_variance_after)  # at some step: another kernel then takes over
        self._steps: int | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if are_used(self):
            step_each(self, partial(adam_, decoupled=True, freeze_after=self._freeze_variance_after))
            return
        if not self._freeze_variance_after or not self.param_groups[0]["params"]:  # a rank may have nothing to step
            super().step(closure)
            return
        if self._steps is None:  # at the start, or after a checkpoint was loaded
            self._steps = int(self.state[self.param_groups[0]["params"][0]]["step"])
        self._steps += 1
        if self._steps <= self._freeze_variance_after:
            super().step(closure)
            return
        for group in self.param_groups:
            for parameters in _runs(group["params"]):
                self._frozen_step(parameters, group)

    def _frozen_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        (beta1, beta2), rate = group["betas"], group["lr"]
        states = [self.state[parameter] for parameter in parameters]
        first = [state["exp_avg"] for state in states]
        scales = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
        torch._foreach_div_(scales, (1 - beta2**self._freeze_variance_after) ** 0.5)
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_add_([state["step"] for state in states], 1)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # all have one
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_addcdiv_(parameters, first, scales, -rate / (1 - beta1**self._steps))


def _runs(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in their order, of which as many at once as together have `_RUN_BYTES`, or one that has more."""
    run: list[Tensor] = []
    for parameter in parameters:
        if run and sum(each.nbytes for each in run) + parameter.nbytes > _RUN_BYTES:
            yield run
            run = []
        run.append(parameter)
    if run:
        yield run
