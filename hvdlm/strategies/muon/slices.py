"""Muon where ranks own slices of each matrix: what is orthogonalised goes to one rank, and its slices come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hvdlm.comm.work import Work
from hvdlm.config import OptimizerSection
from hvdlm.gradients.channel import Channel
from hvdlm.strategies.muon.newton_schulz import orthogonalise
from hvdlm.strategies.muon.optimizer import MuonAdamW
from hvdlm.strategies.muon.shares import deal_out_in_rounds


@dataclass(frozen=True)
class SlicedMatrix:
    """A matrix of which each rank owns a slice of its flattened numbers, one behind the other in the order of ranks."""

    shape: tuple[int, ...]
    lengths: Sequence[int]  # of the slices of all ranks
    own: nn.Parameter | None  # this rank's slice, 1-D, float32; None where it has none


@dataclass(frozen=True)
class SlicedMatrices:
    """The matrices of a model, and the channels among the ranks that own slices of them."""

    matrices: Sequence[SlicedMatrix]
    channels: Sequence[Channel]
    device: torch.device


Round = Sequence[Sequence[SlicedMatrix]]  # by rank, those that it orthogonalises


class SlicedMuonAdamW(MuonAdamW):
    """`MuonAdamW` over slices: each rank keeps the momentum of what it owns, and steps it.

    In rounds, which bound what a rank has of whole matrices at a time, each rank sends its slices of what is to be
    orthogonalised to the ranks that do it, and is sent its slices of the updates. The messages of a round travel while
    matrices of another are orthogonalised. What travels is bfloat16, as which matrices are orthogonalised: the steps
    are those of whole matrices, number by number.
    """

    def __init__(self, groups: Any, sliced: SlicedMatrices, settings: OptimizerSection, **adamw: Any) -> None:
        """`groups`: those of AdamW, by its settings `adamw`; they may have no parameters on this rank."""
        super().__init__(groups, [each.own for each in sliced.matrices if each.own is not None], settings, **adamw)
        self._shapes = {each.own: each.shape for each in sliced.matrices if each.own is not None}
        self._channels = sliced.channels
        self._rank, ranks = sliced.channels[0].exchange.rank, sliced.channels[0].exchange.size
        self._rounds: list[Round] = [
            [[sliced.matrices[index] for index in share] for share in shared]
            for shared in deal_out_in_rounds([each.shape for each in sliced.matrices], ranks)
        ]
        self._nothing = torch.empty(0, dtype=torch.bfloat16, device=sliced.device)
        self._messages = 0  # all-to-alls so far, which take channels in turns

    def _updates(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Collective. Each slice of this rank with that of its matrix's O."""
        momenta: deque[Work[list[Tensor]]] = deque()
        updates: deque[Work[list[Tensor]]] = deque()
        rounds = self._rounds
        for first, second, third in zip(
            chain(rounds, [None, None]), chain([None], rounds, [None]), chain([None, None], rounds), strict=True
        ):
            if first is not None:
                momenta.append(self._send_momenta(first))
            if second is not None:
                updates.append(self._send_updates(second, momenta.popleft().wait()))
            if third is not None:
                yield from self._own_updates(third, updates.popleft().wait())

    def _send_momenta(self, shared: Round) -> Work[list[Tensor]]:
        """Work that ends with what each rank has of the matrices that this one orthogonalises."""
        own = [[each.own for each in share if each.own is not None] for share in shared]
        for part in chain.from_iterable(own):
            self._add_to_momentum(part)
        parts = [self._join(self._nesterov(part).to(torch.bfloat16) for part in share) for share in own]
        lengths = [sum(each.lengths[source] for each in shared[self._rank]) for source in range(len(shared))]
        return self._exchange("momentum", parts, lengths)

    def _send_updates(self, shared: Round, momenta: Sequence[Tensor]) -> Work[list[Tensor]]:
        """Orthogonalises this rank's share. Work that ends with what each rank has made of this rank's slices."""
        share = shared[self._rank]
        arrived = [
            flat.split([each.lengths[source] for each in share]) if share else () for source, flat in enumerate(momenta)
        ]
        made: list[Sequence[Tensor]] = []  # of each matrix, the slices of all ranks
        for each, slices in zip(share, zip(*arrived, strict=True), strict=True):
            made.append(orthogonalise(torch.cat(slices).view(each.shape)).flatten().split(each.lengths))
        parts = [self._join(slices[rank] for slices in made) for rank in range(len(shared))]
        return self._exchange("updates", parts, [self._own_length(each) for each in shared])

    def _own_updates(self, shared: Round, updates: Sequence[Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for share, flat in zip(shared, updates, strict=True):
            position = 0
            for each in share:
                if each.own is not None:
                    yield each.own, flat[position : position + len(each.own)]
                    position += len(each.own)

    def _own_length(self, share: Sequence[SlicedMatrix]) -> int:
        return sum(each.lengths[self._rank] for each in share)

    def _join(self, slices: Iterator[Tensor]) -> Tensor:
        return torch.cat([self._nothing, *slices])

    def _exchange(self, name: str, parts: list[Tensor], lengths: Sequence[int]) -> Work[list[Tensor]]:
        """Begins to send `parts[r]` to rank r, and to receive `lengths[r]` numbers from it; `name`: of the span."""
        channel = self._channels[self._messages % len(self._channels)]
        self._messages += 1
        received = [self._nothing.new_empty(length) for length in lengths]

        def exchange() -> None:
            with channel.timed(name):
                for own, message in zip(received, channel.exchange.all_to_all_v(parts, lengths), strict=True):
                    own.copy_(message)

        def end(_: None) -> list[Tensor]:
            parts.clear()  # not before: on a GPU the channel's stream reads them
            return received

        return channel.run(exchange).then(end)

    def _shape_of(self, part: nn.Parameter) -> tuple[int, ...]:
        return self._shapes[part]
