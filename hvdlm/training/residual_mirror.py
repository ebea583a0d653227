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
        self._number = -1  # of the rank whose they are
        self.taken_over: list[int] = []  # numbers of ranks

    def exchange(
        self, communicator: Communicator, numbers: Sequence[int], own: Sequence[Tensor], scale: float, steps: int
    ) -> None:
        """Sends this rank's residuals after `steps` steps to the next rank, and receives those of the one before.

        `numbers`: of all ranks, which stay when others die. `scale`: of the loss, by which residuals are multiplied,
        a power of two. Collective.
        """
        if communicator.size == 1 or not own:
            return
        sent = torch.cat([each.reshape(-1) for each in own]).div_(scale)
        number = numbers[communicator.rank - 1]
        kept = self._kept if number == self._number else {}
        received = kept.pop(min(kept)) if len(kept) > 1 else torch.empty_like(sent)
        sending = communicator.send_async(sent, (communicator.rank + 1) % communicator.size)
        communicator.receive_(received, (communicator.rank - 1) % communicator.size)
        sending.wait()
        self._kept, self._number = {**kept, steps: received}, number

    def take_over(self, gone: Collection[int], own: Sequence[Tensor], scale: float, steps: int) -> None:
        """Adds to this rank's residuals after `steps` steps those of the rank before it, if that is `gone`."""
        kept = self._kept.get(steps)
        if kept is None or self._number not in gone or self._number in self.taken_over:
            return
        for tensor, mirrored in zip(own, kept.split([each.numel() for each in own]), strict=True):
            tensor.add_(mirrored.view_as(tensor), alpha=scale)
        self.taken_over.append(self._number)
