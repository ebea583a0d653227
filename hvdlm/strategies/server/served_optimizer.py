"""What servers step by: the optimizer of a run on gradients, or its outer optimizer on what workers have learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hvdlm.config import Config
from hvdlm.strategies.optimizer import make_optimizer_of, state_kinds
from hvdlm.strategies.update_loops import add_scaled_

_MOMENTUM = "outer_momentum"  # as checkpoints of local steps among ranks name it


class DelayedNesterov(torch.optim.Optimizer):
    """Of SGD with Nesterov momentum, what follows the last difference of a round, by `.grad`, the sum of all:
    parameters have moved along each of them when it came (Liu et al., "Asynchronous Local-SGD Training for Language
    Modeling", arXiv:2401.09135, delayed Nesterov with c = 0).

    Both together are a step of local_steps/outer_optimizer.py along that sum.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})
        for each in parameters if momentum else ():
            self.state[each] = {_MOMENTUM: torch.zeros_like(each)}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Moves all parameters along the momentum."""
        for group in self.param_groups:
            for each in group["params"] if group["momentum"] else ():
                velocity = self.state[each][_MOMENTUM].mul_(group["momentum"]).add_(each.grad)
                add_scaled_(each, velocity, group["lr"] * group["momentum"])


def make_served_optimizer(
    decaying: Sequence[nn.Parameter], others: Sequence[nn.Parameter], config: Config
) -> torch.optim.Optimizer:
    """The optimizer over a server's parts of parameters that decay, and of those that do not."""
    if config.local_steps.every:
        return DelayedNesterov([*decaying, *others], config.local_steps.lr, config.local_steps.momentum)
    return make_optimizer_of(decaying, others, config.optimizer)


def served_state_kinds(config: Config, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, ...]]:
    """What that keeps of each parameter of a model, by its name and shape, as `state_kinds` has it."""
    if config.local_steps.every:
        return dict.fromkeys(shapes, (_MOMENTUM,) if config.local_steps.momentum else ())
    return state_kinds(config.optimizer, shapes)
