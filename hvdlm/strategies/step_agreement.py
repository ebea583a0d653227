"""What ranks tell one another in a step in which all wait for all."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.work import Work
from hvdlm.strategies.strategy import Pace, Report, StepEnd, raise_if_unreadable


class StepAgreement:
    """The reports of all ranks on one step after the other."""

    def __init__(self) -> None:
        self._stops = self._saves = self._ends = self._unread = 0
        self._paces: tuple[Pace, ...] = ()

    def begin(self, communicator: Communicator, own: Report) -> Work[int]:
        """Tells the others of this rank; the result is the sum of the tokens of all (`Strategy.begin_step`)."""
        message = own.message()
        if own.pace is not None:  # in a place of its own among those of all ranks, in which the others have zeros
            paces = torch.zeros(communicator.size, len(own.pace), dtype=torch.int64)
            paces[communicator.rank] = torch.tensor(own.pace)
            message = torch.cat([message, paces.flatten()])
        reduction = communicator.all_reduce_async_(message)  # while the first passes run
        return reduction.then(partial(self._read, communicator, own.error))

    def _read(self, communicator: Communicator, error: str | None, totals: Tensor) -> int:
        tokens, stops, saves, unread, errors, ends, *paces = totals.tolist()
        if errors:
            raise_if_unreadable(communicator, error)
        self._stops, self._saves, self._ends, self._unread = stops, saves, ends, unread
        self._paces = tuple(map(Pace, paces[::2], paces[1::2]))
        return int(tokens)

    def end(self) -> StepEnd:
        """What all ranks know now."""
        stop, save, end = self._stops > 0, self._saves > 0, self._ends > 0
        return StepEnd(stop, save, self._unread, ranks_have_met=True, end=end, paces=self._paces)
