"""Compute that is a sleep: the trainer as it is, but forward and backward pass only take their time.

So communication alone is studied, with more ranks than cores: gradients appear block by block as a device beside the
cores would make them, through the same hooks, buckets, codecs and messages as real ones.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from hvdlm.training.trainer import Trainer

_FORWARD = 1 / 3  # of the time of both passes: two products backward for one forward


class SimulatedTrainer(Trainer):
    """Spends on a micro-batch what a rank would that computes `tokens_per_second`."""

    tokens_per_second: float

    def prepare(self, tokens_per_second: float) -> None:
        """To be called before the first step."""
        self.tokens_per_second = tokens_per_second
        generator = torch.Generator().manual_seed(self.communicator.rank)
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(".".join(name.split(".")[:2]), []).append(parameter)
        # Looking up an embedding takes no time; the product with the output weight does, first of all, though it may
        # share the embedding
        work = {
            name: 0 if "embedding" in name or name.startswith("output.") else sum(each.numel() for each in group)
            for name, group in groups.items()
        }
        output = self.model.output_weight.numel()
        total = sum(work.values()) + output
        self._output_share = output / total
        self._blocks = [
            (
                work[name] / total,
                group,
                [
                    (1e-3 * torch.randn(parameter.shape, generator=generator)).to(parameter.device)
                    for parameter in group
                ],
            )
            for name, group in groups.items()
        ]

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        seconds = inputs.numel() / self.tokens_per_second
        backward = (1 - _FORWARD) * seconds
        clock = _Clock()
        clock.spend(_FORWARD * seconds)
        chain = torch.zeros((), requires_grad=True)
        for share, parameters, gradients in self._blocks:
            chain = _Block.apply(chain, clock, backward * share, gradients, *parameters)
        return _Output.apply(chain, clock, backward * self._output_share)

    def _apply(self, correction: float, rate: float) -> float:
        """Plain descent, so that parameters show whether all ranks had the same gradients."""
        gradients = [parameter.grad for parameter in self.parameters.values()]
        with torch.no_grad():
            torch._foreach_add_(list(self.parameters.values()), gradients, alpha=-1e-3 / self.communicator.size)
        return 0.0


class _Clock:
    """Sleeps until what was to be done would be, however long the processor was about something else meanwhile."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._due = time.perf_counter()

    def spend(self, seconds: float) -> None:
        self._due += seconds
        time.sleep(max(0.0, self._due - time.perf_counter()))


class _Block(torch.autograd.Function):
    """Passes its input on; backward it takes its time, then has gradients for its parameters."""

    @staticmethod
    def forward(
        ctx: Any, chain: Tensor, clock: _Clock, seconds: float, gradients: list[Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.clock, ctx.seconds, ctx.gradients = clock, seconds, gradients
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.clock.spend(ctx.seconds)
        return gradient, None, None, None, *ctx.gradients


class _Output(torch.autograd.Function):
    """Where the backward pass begins: with the gradient of the output's product."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, clock: _Clock, seconds: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.clock.begin()
        ctx.clock.spend(ctx.seconds)
        return gradient, None, None
