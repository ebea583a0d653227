"""Gradients on their way to the ranks that own them.

Stage 1 keeps the gradients of a rank whole until the last micro-batch. Stages 2 and 3 send those of every micro-batch,
partition by partition, and keep the sum of what a rank owns: a partition's memory is there from its first gradient
until its sum has been taken from it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvdlm.comm.work import Work
from hvdlm.gradients.channel import Channel
from hvdlm.gradients.codecs.codec import Codec
from hvdlm.gradients.codecs.dense import Dense
from hvdlm.strategies.sharded.partition import Partition, free, hold

# Partitions whose sums are under way while the backward pass fills another one
_UNDER_WAY = 2


class _UnderWay(NamedTuple):
    """A partition on its way to its owners."""

    number: int
    work: Work[None]
    is_last: bool  # of this step; a pass that ends before the last one may still be under way when that has begun


class ShardedGradients:
    """Sums the gradients of partitions, each at its owners. Every rank sends all partitions in one order."""

    def __init__(
        self,
        partitions: Sequence[Partition],
        codecs: Sequence[Codec],
        channels: Sequence[Channel],
        copies: Sequence[Channel],
        keeps_whole: bool,
    ) -> None:
        """`partitions`: in the order in which a backward pass completes them. `channels`: to the owners; `copies`: to
        those that own the same parts of other copies of the model, if there are any. `keeps_whole`: stage 1; else their
        buffers have no memory now.
        """
        self.partitions, self.codecs, self.channels = partitions, codecs, channels
        self._copies, self._keeps_whole = copies, keeps_whole
        self.step = 0
        self._slots = {
            parameter: (partition, slot)
            for partition in partitions
            for parameter, slot in zip(partition.parameters, partition.slots, strict=True)
        }
        # Of each partition: what this rank owns of the sums, as long as a part
        self.own = [each.own_slot if keeps_whole else torch.zeros_like(each.own_slot) for each in partitions]
        self._hooks = [each.register_post_accumulate_grad_hook(self._on_gradient) for each in self._slots]
        self._under_way: deque[_UnderWay] = deque()
        self._next = 0  # the partition to be sent next in this pass
        self._made: set[Tensor] = set()  # parameters whose gradients of this pass are final
        self._is_final = False  # whether gradients are sent when they are made
        self._has_sum = [False] * len(partitions)  # of an earlier pass of this step
        self._is_last_pass = False
        self._rank = channels[0].exchange.rank
        self._dense = [Dense(partition, codec.settings) for partition, codec in zip(partitions, codecs, strict=True)]
        self._between_copies: list[Work[None]] = []
        # By which what codecs have kept in the step under way can be taken back: copies, or what is left in buffers
        self._residuals_before: list[tuple[Tensor, Tensor]] = []
        self._sent: list[tuple[Partition, Codec]] = []

    # ---- one step

    def begin_step(self) -> None:
        """There are no gradients."""
        for parameter in self._slots:
            parameter.grad = None
        self._has_sum = [False] * len(self.partitions)
        self._is_last_pass, self._is_final, self._sent = False, not self._keeps_whole, []
        self._begin_pass()
        self._residuals_before = [
            (kept, kept.clone())
            for partition, codec in zip(self.partitions, self.codecs, strict=True)
            if not self._can_take_back(partition, codec)
            for kept in [*codec.state().values(), *codec.extra_state().values()]
        ]

    def set_last_micro_batch(self) -> None:
        """From here on gradients are final, in stage 1, too."""
        self._is_last_pass = self._is_final = True

    def end_pass(self) -> None:
        """After the backward pass of a micro-batch, on all ranks."""
        if not self._keeps_whole:
            self._complete_pass()
            self._begin_pass()

    def wait(self) -> None:
        """Returns when this rank's parts hold the sums over all ranks."""
        if self._keeps_whole:
            self._is_final = True
            self._complete_pass()
        while self._under_way:
            self._take_sum()
        for work in self._between_copies:
            work.wait()
        self._between_copies.clear()
        self.step += 1

    def keep_residuals_if(self, is_finite: Tensor) -> None:
        """Once the norm of all gradients is known, in a step whose gradients are left out unless it `is_finite`, a bool
        scalar: then what codecs have kept is what it was before.
        """
        if not is_finite.is_cpu:
            for kept, before in self._residuals_before:
                kept.copy_(torch.where(is_finite, kept, before))
            self._residuals_before = []
        elif is_finite:
            self._residuals_before, self._sent = [], []
        else:
            self.take_back()

    def take_back(self) -> None:
        """Of a step that ends before its gradients are complete, what codecs have kept is what it was before."""
        while self._under_way:
            self._take_sum()
        for kept, before in self._residuals_before:
            kept.copy_(before)
        self._residuals_before = []
        for partition, codec in self._sent:
            codec.take_back_(partition.buffer, self._rank)
        self._sent = []

    def _can_take_back(self, partition: Partition, codec: Codec) -> bool:
        """Whether what is left of gradients in the buffer tells what the codec has kept before."""
        return self._keeps_whole and codec.can_take_back(partition.buffer)

    def scale_(self, factor: float | Tensor) -> None:
        """Multiplies all gradients by a number."""
        for own in self.own:
            own.mul_(factor)

    def release(self) -> None:
        """Lets go of the model."""
        for hook in self._hooks:
            hook.remove()

    # ---- one pass

    def _begin_pass(self) -> None:
        self._next = 0
        for partition in self.partitions:
            partition.pending = len(partition.parameters)
        self._made = set()

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        partition, slot = self._slots[parameter]
        assert parameter.grad is not None
        self._make_room(partition)
        if parameter.grad is not slot:
            slot.copy_(parameter.grad)
        parameter.grad = slot if self._keeps_whole else None
        if self._is_final:
            self._made.add(parameter)
            partition.pending -= 1
            self._send_ready()

    def _complete_pass(self) -> None:
        """Zeros for parameters that have got no gradient, and sends what has not been sent."""
        for partition in self.partitions[self._next :]:
            self._make_room(partition)
            for parameter in partition.parameters:
                if parameter not in self._made:
                    slot = self._slots[parameter][1]
                    if parameter.grad is None:
                        slot.zero_()
                    elif parameter.grad is not slot:  # made apart from the backward pass
                        slot.copy_(parameter.grad)
                    partition.pending -= 1
        self._send_ready()

    def _make_room(self, partition: Partition) -> None:
        """Memory for the gradients of a partition, once the sum of an earlier pass has been taken from there."""
        while any(self.partitions[each.number] is partition for each in self._under_way):
            self._take_sum()
        hold(partition.buffer)

    def _send_ready(self) -> None:
        while self._next < len(self.partitions) and self.partitions[self._next].pending == 0:
            while len(self._under_way) >= _UNDER_WAY and not self._keeps_whole:
                self._take_sum()
            self._under_way.append(_UnderWay(self._next, self._send(self._next), self._is_last_pass))
            self._next += 1

    def _send(self, index: int) -> Work[None]:
        partition, codec = self.partitions[index], self.codecs[index]
        partition.fill_up_(partition.buffer)
        channel = self.channels[index % len(self.channels)]
        if self._can_take_back(partition, codec):
            self._sent.append((partition, codec))

        def reduce() -> None:
            with channel.timed(f"bucket {index + 1}"):
                codec.reduce_to_owners_(partition.buffer, channel.exchange, self.step)

        return channel.run(reduce)

    def _take_sum(self) -> None:
        """Of the partition that was sent first."""
        index, work, is_last = self._under_way.popleft()
        work.wait()
        partition, own = self.partitions[index], self.own[index]
        if not self._keeps_whole:
            if self._has_sum[index]:
                own.add_(partition.own_slot)
            else:
                own.copy_(partition.own_slot)
                self._has_sum[index] = True
            free(partition.buffer)
        if self._copies and is_last:
            channel = self._copies[index % len(self._copies)]
            work = channel.submit(self._dense[index], own, self.step, f"copies of bucket {index + 1}")
            self._between_copies.append(work)
