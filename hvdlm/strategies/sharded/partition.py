"""Parameters one behind the other in a flat tensor, of which each rank owns an equal part.

A part is a span of the flat tensor whatever parameters lie there, so that all ranks own as much, and of a parameter a
rank owns a span of its flattened numbers, or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvdlm.gradients.bucket import Bucket

# Elements: parts begin at multiples of this, so that 16-bit numbers can be viewed as any dtype and vectors are aligned
_ALIGNMENT = 32


class Piece(NamedTuple):
    """What a rank owns of one parameter."""

    start: int  # in the flattened parameter
    stop: int
    offset: int  # in the rank's part of the partition

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def span(self) -> slice:
        """In the rank's part."""
        return slice(self.offset, self.offset + self.length)


class Partition(Bucket):
    """The parameters of a module that are gathered, and whose gradients are summed, together.

    `buffer`: their gradients, float32. `weights`: what this rank computes with, in the dtype in which it is gathered.
    Both are as long as all parts, `total` numbers and what fills up the last part, and have memory only between `hold`
    and `free`. `master`: this rank's part of the float32 parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
        dtype: torch.dtype,
        rank: int,
        ranks: int,
        is_kept: bool,
        is_rounded: bool = False,
    ) -> None:
        """`parameters`: by name; shapes are all that is asked of them. `rank`: this one of the `ranks` that own parts.
        `is_kept`: whether `weights` stay from step to step. `is_rounded`: whether they may differ from the masters.
        """
        self.is_kept = is_kept
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.total = sum(parameter.numel() for parameter in self.parameters)
        length = -(-self.total // (ranks * _ALIGNMENT)) * _ALIGNMENT  # of a part
        self.buffer = torch.zeros(length * ranks, dtype=torch.float32, device=device)
        self.weights = torch.zeros(length * ranks, dtype=dtype, device=device)
        self._ranks, self._length = ranks, length
        self.part = self._part_of(rank)
        # Views of `buffer`, of which none can be made while it has no memory: of parameters, and of this rank's part
        self.slots, self.own_slot = self.split(self.buffer), self.buffer[self.part]
        self.pieces = self.pieces_of(rank)
        own = self.weights[self.part]
        self.master_is_part = is_kept and dtype == torch.float32 and not is_rounded
        self.master = own if self.master_is_part else torch.zeros_like(own, dtype=torch.float32)
        self.pending = len(self.parameters)  # gradients that the pass under way has not made

    def split(self, flat: Tensor) -> list[Tensor]:
        return super().split(flat[: self.total])  # what remains fills up the last part

    def fill_up_(self, flat: Tensor) -> None:
        """Zeros what is of no parameter, at the end of a tensor as long as all parts."""
        flat[self.total :].zero_()

    def load(self, name: str, values: Tensor) -> None:
        """Takes over what this rank owns of a parameter. `values`: all of it."""
        if piece := self.pieces.get(name):
            self.master[piece.span].copy_(values.reshape(-1)[piece.start : piece.stop])

    def lengths(self) -> dict[str, list[int]]:
        """Of each parameter, how many of its numbers each rank owns: one behind the other, in the order of ranks."""
        by_rank = [self.pieces_of(rank) for rank in range(self._ranks)]
        return {name: [pieces[name].length if name in pieces else 0 for pieces in by_rank] for name in self.names}

    def _part_of(self, rank: int) -> slice:
        return slice(rank * self._length, (rank + 1) * self._length)

    def pieces_of(self, rank: int) -> dict[str, Piece]:
        """What a rank owns, by the names of parameters."""
        part, found, begin = self._part_of(rank), {}, 0
        for name, parameter in zip(self.names, self.parameters, strict=True):
            start, stop = max(begin, part.start), min(begin + parameter.numel(), part.stop)
            if start < stop:
                found[name] = Piece(start - begin, stop - begin, start - part.start)
            begin += parameter.numel()
        return found


def hold(tensor: Tensor) -> None:
    """Gives a tensor memory, if `free` has taken it. What is in it then means nothing."""
    storage = tensor.untyped_storage()
    if storage.size() == 0:
        storage.resize_(tensor.numel() * tensor.element_size())


def free(tensor: Tensor) -> None:
    """Frees the memory of a tensor, and of its views, which keep their shapes."""
    tensor.untyped_storage().resize_(0)
