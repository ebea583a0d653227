"""Weights on their way from their owners to all ranks, as numbers of a few bits.

Ranks that keep weights from step to step (stages 1 and 2) are sent what has changed: the difference between an owner's
float32 numbers and the weights that all ranks have. What rounding leaves of it is part of the next difference, since
the owner makes that from the same weights: error feedback without a residual. So weights are behind by a fraction of
one update, whatever the number of steps.

Ranks that free them (stage 3) are sent the numbers themselves, rounded in blocks (Wang et al., "ZeRO++: Extremely
Efficient Collective Communication for Giant Model Training", ICLR 2024, section 3.1). Owners compute with the rounded
ones, too.

Matrices are rounded as by the codecs `int8`, `int4` and `int2`; biases and norms are sent as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hvdlm.gradients.codecs.blockwise import LONGEST_BLOCK, Part, message_bytes, sections_of, split_evenly
from hvdlm.gradients.codecs.codec import uses_loops
from hvdlm.gradients.codecs.integer import IntegerEncoding, add_to_weights, compile_for_cpu, round_differences
from hvdlm.gradients.exchange import Exchange
from hvdlm.strategies.sharded.partition import Partition


class _Workspace(NamedTuple):
    """Memory of one channel, as long as the longest part."""

    numbers: Tensor  # zeros where there are no blocks
    error: Tensor


@dataclass(frozen=True)
class _Layout:
    """Of one partition."""

    parts: Sequence[Part]  # of all ranks; indices are within a part
    nbytes: int  # of a message


class RoundedWeights:
    """Gathers the weights of partitions, whose `weights` afterwards are equal on all ranks."""

    def __init__(self, bits: int, partitions: Sequence[Partition], ranks: int) -> None:
        """`bits`: 2, 4 or 8, of a number."""
        self._bits, self._encoding = bits, IntegerEncoding(bits)
        self._layouts = {each: self._layout(each, ranks) for each in partitions}
        self._longest = max(len(each.own_slot) for each in partitions)
        self._workspaces: dict[Exchange, _Workspace] = {}
        if partitions[0].weights.is_cpu:
            compile_for_cpu(bits)

    def gather(self, partition: Partition, exchange: Exchange) -> None:
        """On the thread of a channel; collective."""
        layout = self._layouts[partition]
        messages = exchange.all_gather(self._encode(partition, layout, exchange))
        for part, weights, message in zip(
            layout.parts, partition.weights.split(len(partition.own_slot)), messages, strict=True
        ):
            dense, blocks = sections_of(part, message)
            if self._has_loops(partition):
                add_to_weights(part, self._bits, blocks, weights)
            else:
                self._add(partition, part, blocks, weights, exchange)
            weights[part.dense] = dense.to(weights.dtype)

    def _encode(self, partition: Partition, layout: _Layout, exchange: Exchange) -> Tensor:
        own, weights = layout.parts[exchange.rank], partition.weights[partition.part]
        message = torch.zeros(layout.nbytes, dtype=torch.uint8, device=weights.device)
        dense, blocks = sections_of(own, message)
        dense.copy_(partition.master[own.dense])
        if self._has_loops(partition):
            round_differences(own, self._bits, partition.master, weights, blocks)
            return message
        numbers, error = (each[: len(weights)] for each in self._workspace(exchange, partition))
        if partition.is_kept:
            torch.sub(partition.master, weights, out=numbers)
        else:
            numbers.copy_(partition.master)
        self._encoding.encode(own, numbers, error.zero_(), blocks)
        numbers.zero_()
        return message

    def _add(self, partition: Partition, part: Part, blocks: Tensor, weights: Tensor, exchange: Exchange) -> None:
        numbers = self._workspace(exchange, partition).numbers[: len(weights)]
        self._encoding.add(part, [blocks], numbers, from_zero=True)
        if partition.is_kept:
            weights.add_(numbers)
        else:
            weights.copy_(numbers)
        part.zero_blocks_(numbers)

    def _has_loops(self, partition: Partition) -> bool:
        """Whether one loop makes differences and rounds them, and one adds them to weights."""
        is_bf16 = partition.weights.dtype == torch.bfloat16
        return partition.is_kept and is_bf16 and uses_loops(partition.weights)

    def _layout(self, partition: Partition, ranks: int) -> _Layout:
        length = len(partition.own_slot)
        split = split_evenly(partition, LONGEST_BLOCK, ranks)
        parts = [each.moved(-rank * length) for rank, each in enumerate(split)]
        return _Layout(parts, max(message_bytes(self._encoding, each) for each in parts))

    def _workspace(self, exchange: Exchange, partition: Partition) -> _Workspace:
        if exchange not in self._workspaces:
            zeros = torch.zeros(2, self._longest, device=partition.weights.device)
            self._workspaces[exchange] = _Workspace(*zeros)
        return self._workspaces[exchange]
