"""A trainer whose forward and backward pass are sleeps, to study communication with more ranks than cores.

Gradients appear block by block while it sleeps, as if a device beside the CPU computed them, and go through the same
hooks, buckets, codecs and messages as real ones.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from hvdlm.training.trainer import Trainer

_FORWARD_SHARE = 1 / 3  # of the time of both passes: the backward pass has two matrix products for each forward one


class SimulatedPasses(Trainer):
    """Spends as much time on a micro-batch as a rank that computes `tokens_per_second`."""

    tokens_per_second: float

    def prepare(self, tokens_per_second: float) -> None:
        """Sets the speed of a rank. Must be called before the first step."""
        self.tokens_per_second = tokens_per_second
        generator = torch.Generator().manual_seed(self.communicator.rank)
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            groups.setdefault(".".join(name.split(".")[:2]), []).append(parameter)
        # Compute time is in proportion to parameters. Looking up an embedding takes none; the product with the output
        # weight does, at the start of the backward pass, also where that weight is the embedding
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

    def micro_batch_loss(self, inputs: Tensor, targets: Tensor, factor: float) -> Tensor:
        seconds = inputs.numel() / self.tokens_per_second
        backward = (1 - _FORWARD_SHARE) * seconds
        clock = _Clock()
        clock.spend(_FORWARD_SHARE * seconds)
        chain = torch.zeros((), requires_grad=True)
        for share, parameters, gradients in self._blocks:
            chain = _Block.apply(chain, clock, backward * share, gradients, *parameters)
        return _Output.apply(chain, clock, backward * self._output_share)


class SimulatedTrainer(SimulatedPasses):
    """Nor does it take the time of an optimizer's step: that is arithmetic of the device that is simulated."""

    def prepare(self, tokens_per_second: float) -> None:
        super().prepare(tokens_per_second)
        self.strategy.norm = lambda: torch.zeros(())  # type: ignore[method-assign]

    def _scale_and_clip(self, unscale: float, norm: Tensor) -> None:
        pass

    def _update(self, rate: float) -> None:
        """Plain gradient descent, so that parameters differ between ranks if summed gradients do."""
        parameters = list(self.model.parameters())
        gradients = [parameter.grad for parameter in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-1e-3 / self.communicator.size)


class _Clock:
    """Sleeps until the simulated work would be done; time that other code has used since then counts."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._due = time.perf_counter()

    def spend(self, seconds: float) -> None:
        self._due += seconds
        time.sleep(max(0.0, self._due - time.perf_counter()))


class _Block(torch.autograd.Function):
    """Passes its input on. Backward, it sleeps and then returns the gradients of its parameters."""

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
    """The start of the backward pass: the matrix product with the output weight."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, clock: _Clock, seconds: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.clock.begin()
        ctx.clock.spend(ctx.seconds)
        return gradient, None, None
