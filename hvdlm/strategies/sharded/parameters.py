"""Parameters that a rank computes with, gathered from the parts that ranks own.

Stages 1 and 2 gather all of them once a step, in the order in which the next forward pass reads them, while it computes
with those that are there. Stage 3 gathers those of a block before its forward and its backward pass, those of the next
one meanwhile, and frees them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvdlm.comm.work import Work
from hvdlm.gradients.channel import Channel
from hvdlm.model.parameter_access import EMBEDDING, ParameterAccess, Part
from hvdlm.strategies.sharded.partition import Partition, free, hold
from hvdlm.strategies.sharded.rounded_weights import RoundedWeights


class ShardedParameters(ParameterAccess):
    """The partitions of a model, and which of them its parts read."""

    def __init__(
        self,
        readers: Mapping[Part, Sequence[Partition]],
        channels: Sequence[Channel],
        rounded: RoundedWeights | None = None,
    ) -> None:
        """`readers`: the partitions that each part of the model reads, in the order of the forward pass. `rounded`: how
        weights are sent; None: as they are.
        """
        self._readers, self._rounded = readers, rounded
        self._order = list(readers)
        every = dict.fromkeys(partition for partitions in readers.values() for partition in partitions)
        self._partitions = [*every]
        self._channels = channels
        self._arriving: dict[Partition, Work[None]] = {}
        self._present: set[Partition] = set()
        self._next_channel = 0

    def publish(self) -> None:
        """Masters have changed: gathers what is kept, and forgets the rest. Collective."""
        self._publish(self._rounded, of_masters=True)

    def publish_unrounded(self, of_masters: bool = True) -> None:
        """The same, without rounding; unless `of_masters`, kept weights as their owners have them now. Collective."""
        self._publish(None, of_masters)

    def _publish(self, rounded: RoundedWeights | None, of_masters: bool) -> None:
        for partition in self._partitions:
            self._forget(partition)
        for partition in self._partitions:
            if partition.is_kept:
                self._begin(partition, rounded, of_masters)

    def wait(self) -> None:
        """Returns when what is kept has arrived."""
        self._acquire(partition for partition in self._partitions if partition.is_kept)

    # ---- ParameterAccess

    def before(self, part: Part, x: Tensor) -> Tensor:
        if part == EMBEDDING:  # what a pass that had no backward pass has left
            self._release(self._present.difference(self._readers[EMBEDDING]))
        self._acquire(self._readers[part])
        following = self._order.index(part) + 1
        if following < len(self._order):
            self._prefetch(self._order[following])
        if part == EMBEDDING:  # its backward pass does not read it
            return x
        return _on_backward(x, partial(self._release, self._readers[part]))

    def after(self, part: Part, x: Tensor) -> Tensor:
        has_backward = part != EMBEDDING and torch.is_grad_enabled() and x.requires_grad
        if not has_backward or part != self._order[-2]:  # the last block, whose backward pass comes first
            self._release(self._readers[part])
        return _on_backward(x, partial(self._enter_backward, part)) if has_backward else x

    def _enter_backward(self, part: Part) -> None:
        self._acquire(self._readers[part])
        preceding = self._order[self._order.index(part) - 1]
        if preceding != EMBEDDING:
            self._prefetch(preceding)

    # ---- one partition

    def _acquire(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            if partition not in self._present:
                if partition not in self._arriving:
                    self._begin(partition, self._rounded)
                self._arriving.pop(partition).wait()
                self._present.add(partition)

    def _prefetch(self, part: Part) -> None:
        for partition in self._readers[part]:
            if partition not in self._present and partition not in self._arriving:
                self._begin(partition, self._rounded)

    def _begin(self, partition: Partition, rounded: RoundedWeights | None, of_masters: bool = True) -> None:
        hold(partition.weights)
        if rounded is None and of_masters and not partition.master_is_part:
            partition.weights[partition.part].copy_(partition.master)
        channel = self._channels[self._next_channel % len(self._channels)]
        self._next_channel += 1

        def gather() -> None:
            with channel.timed("weights"):
                if rounded is None:
                    channel.exchange.all_gather_(partition.weights)
                else:
                    rounded.gather(partition, channel.exchange)

        self._arriving[partition] = channel.run(gather)

    def _release(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            if not partition.is_kept and partition in self._present:
                self._forget(partition)

    def _forget(self, partition: Partition) -> None:
        if partition in self._arriving:
            self._arriving.pop(partition).wait()
        self._present.discard(partition)
        if not partition.is_kept:
            free(partition.weights)


class _OnBackward(torch.autograd.Function):
    """Passes on its input, and calls a function when the backward pass comes here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[], None]) -> Tensor:
        ctx.function = function
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.function()
        return grad, None


def _on_backward(x: Tensor, function: Callable[[], None]) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    passed_on: Tensor = _OnBackward.apply(x, function)  # type: ignore[no-untyped-call]
    return passed_on
