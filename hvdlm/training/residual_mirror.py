"""`comm.mirror_residuals`: each rank keeps what the one before it has not delivered of its gradients, if that dies."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator


class ResidualMirror:
    """The residuals of the rank before this one, as they were after the last two steps.

    After a death ranks go on from the last step that one of them has completed, or from the one before it.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # flat, by the number of steps done
        self._rank = -1  # whose they are

    def exchange(self, communicator: Communicator, ranks: Sequence[int], own: Sequence[Tensor], steps: int) -> None:
        """Sends this rank's residuals after `steps` steps to the next rank, and receives those of the one before.

        `ranks`: their numbers, which stay when others die. Collective.
        """
        if communicator.size == 1 or not own:
            return
        sent = torch.cat([each.reshape(-1) for each in own])
        oldest = min(self._kept) if len(self._kept) > 1 else None
        received = torch.empty_like(sent) if oldest is None else self._kept.pop(oldest)
        before, after = communicator.rank - 1, (communicator.rank + 1) % communicator.size
        sending = communicator.send_async(sent, after)
        communicator.receive_(received, before % communicator.size)
        sending.wait()
        self._kept[steps], self._rank = received, ranks[before]

    def take_over(self, dead: Collection[int], own: Sequence[Tensor], steps: int) -> int | None:
        """Adds to this rank's residuals after `steps` steps those of the rank before it, if that is among the `dead`:
        returns its number.
        """
        kept, rank = self._kept.get(steps), self._rank
        self._kept, self._rank = {}, -1
        if kept is None or rank not in dead:
            return None
        for tensor, mirrored in zip(own, kept.split([each.numel() for each in own]), strict=True):
            tensor.add_(mirrored.view_as(tensor))
        return rank
