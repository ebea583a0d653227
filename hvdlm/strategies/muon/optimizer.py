"""Matrices of blocks by Muon, of which each rank orthogonalises some; all other parameters by AdamW."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import DeadRankError
from hvdlm.comm.work import Work
from hvdlm.config import OptimizerSection
from hvdlm.strategies.frozen_variance_adamw import FrozenVarianceAdamW
from hvdlm.strategies.muon.newton_schulz import orthogonalise
from hvdlm.strategies.muon.shares import deal_out_in_rounds
from hvdlm.strategies.update_loops import add_scaled_, move_

MOMENTUM = "muon_momentum"


class MuonAdamW(FrozenVarianceAdamW):
    """Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, with Nesterov momentum.

    M = mu M + (1 - mu) G;  O = orthogonalise(mu M + (1 - mu) G);  X -= rate decay X;  X -= rate adjustment O

    M is equal on all ranks, since G is; O, which takes nearly all of the time, is made by one rank for all. So the
    outcome does not depend on the number of ranks, and a rank that has lost another can make every O by itself.
    """

    def __init__(self, groups: Any, matrices: Sequence[nn.Parameter], settings: OptimizerSection, **adamw: Any) -> None:
        """`groups`: those of AdamW, by its settings `adamw`."""
        super().__init__(groups, **adamw)
        self._matrices = list(matrices)
        self._settings = settings
        self._communicator: Communicator | None = None
        self.sent_bytes = 0  # by this rank to others, in the last step
        for matrix in matrices:
            self.state[matrix] = {MOMENTUM: torch.zeros_like(matrix)}

    def deal_out_among(self, communicator: Communicator | None) -> None:
        """From now on `step` is collective among these ranks, whose gradients are equal; None: this rank steps alone.

        If a rank dies in a step, the others complete it, each alone.
        """
        self._communicator = communicator

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Of all parameters, matrices with a gradient; `closure` is not called."""
        rate = self.param_groups[0]["lr"] * self._settings.muon_lr_ratio
        for part, update in self._updates():
            part.mul_(1 - rate * self._settings.weight_decay)
            add_scaled_(part, update, -rate * self._adjustment(*self._shape_of(part)))
        super().step()

    def _updates(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each matrix with its O, which may be a view of what is gathered."""
        matrices = [each for each in self._matrices if each.grad is not None]
        for matrix in matrices:
            self._add_to_momentum(matrix)
        self.sent_bytes = 0
        communicator = self._communicator
        if communicator is None or communicator.size == 1:
            yield from ((matrix, self._orthogonalise(matrix)) for matrix in matrices)
            return
        rounds = [
            [[matrices[index] for index in share] for share in shared]
            for shared in deal_out_in_rounds([tuple(each.shape) for each in matrices], communicator.size)
        ]
        gathered = 0
        with suppress(DeadRankError):
            for shared, parts in zip(rounds, self._gather(rounds, communicator), strict=True):
                for share, part in zip(shared, parts, strict=True):
                    updates = part.split([each.numel() for each in share])
                    yield from ((each, update.view_as(each)) for each, update in zip(share, updates, strict=True))
                gathered += 1
        for matrix in chain.from_iterable(chain.from_iterable(rounds[gathered:])):
            yield matrix, self._orthogonalise(matrix)

    def _gather(
        self, rounds: Sequence[Sequence[Sequence[nn.Parameter]]], communicator: Communicator
    ) -> Iterator[list[Tensor]]:
        """Orthogonalises this rank's share of each round; yields those of all ranks, flat, in the order of rounds."""
        under_way: deque[Work[list[Tensor]]] = deque()
        for shared in rounds:
            own = [self._orthogonalise(matrix).flatten() for matrix in shared[communicator.rank]]
            flat = torch.cat(own) if own else self._matrices[0].new_empty(0, dtype=torch.bfloat16)
            self.sent_bytes += (communicator.size - 1) * flat.nbytes
            lengths = [sum(matrix.numel() for matrix in share) for share in shared]
            under_way.append(communicator.all_gather_v_async(flat, lengths))
            if len(under_way) > 1:
                yield under_way.popleft().wait()
        while under_way:
            yield under_way.popleft().wait()

    def _orthogonalise(self, matrix: nn.Parameter) -> Tensor:
        return orthogonalise(self._nesterov(matrix))

    def _add_to_momentum(self, part: nn.Parameter) -> None:
        assert part.grad is not None
        move_(self.state[part][MOMENTUM], part.grad, 1 - self._settings.muon_momentum)

    def _nesterov(self, part: nn.Parameter) -> Tensor:
        """What is orthogonalised, float32, once the gradient has been added to the momentum; as `part` is shaped."""
        assert part.grad is not None
        ahead = part.grad.clone()
        move_(ahead, self.state[part][MOMENTUM], self._settings.muon_momentum)
        return ahead

    def _shape_of(self, part: nn.Parameter) -> tuple[int, ...]:
        """Of the matrix that `part` is, or is a part of."""
        return tuple(part.shape)

    def _adjustment(self, rows: int, columns: int) -> float:
        """By what the rate of a matrix is multiplied, as its shape makes updates larger or smaller."""
        if self._settings.muon_adjustment == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))  # Liu et al., arXiv:2502.16982, section 2.2
