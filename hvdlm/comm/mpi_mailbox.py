"""A mailbox over MPI: letters are matched whoever has sent them, by probes of a communicator that nothing else uses.

Open MPI moves a message that is longer than its eager limit only while both sides call it: whoever has posted one looks
after it, by `flush`, `has_sent` or by taking letters.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from mpi4py import MPI
from torch import Tensor

from hvdlm.arrays import as_array
from hvdlm.comm.failure import lost_rank_errors
from hvdlm.comm.mailbox import Letter, Mailbox, letter_of
from hvdlm.comm.mpi import CAN_SHRINK


class MPIMailbox(Mailbox):
    """Ranks of an MPI communicator, which is the mailbox's own."""

    def __init__(self, group: MPI.Comm, timeout: float) -> None:
        super().__init__(timeout)
        self._group = group
        self.rank, self.size = group.Get_rank(), group.Get_size()
        self._lock = threading.Lock()
        self._under_way: list[tuple[int, MPI.Request, Tensor]] = []  # to whom, and what must stay as it is until then
        self._dead: set[int] = set()

    def _post(self, message: Tensor, destinations: Sequence[int]) -> None:
        for destination in destinations:
            with self._errors(), self._lock:
                if destination not in self._dead:
                    request = self._group.Isend(as_array(message), destination)
                    self._under_way.append((destination, request, message))

    def take(self) -> Letter | None:
        self.has_sent()
        with self._errors():
            status = MPI.Status()
            found = self._group.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status)
            if found is not None:
                message = torch.empty(status.Get_count(MPI.BYTE), dtype=torch.uint8)
                found.Recv(as_array(message))
                return letter_of(message, status.Get_source())
        return None

    def has_sent(self) -> bool:
        with self._lock:
            left = []
            for destination, request, message in self._under_way:
                is_done = False
                with self._errors():
                    is_done = request.Test()
                if not is_done and destination not in self._dead:
                    left.append((destination, request, message))
            self._under_way = left
            return not left

    def dead(self) -> Collection[int]:
        self._notice_deaths()
        return self._dead

    def close(self) -> None:
        self.flush()
        if not CAN_SHRINK:  # among ranks of whom some have died it would wait for them
            self._group.Free()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """An operation fails because a rank has died, of which then `dead` tells; or because another is lost."""
        try:
            with lost_rank_errors("mpi", self.rank, MPI.Exception):
                yield
        except Exception:
            if not self._notice_deaths():
                raise

    def _notice_deaths(self) -> bool:
        """Whether some ranks are known to have died. Once they are acknowledged, those that live can be heard again."""
        if not CAN_SHRINK:
            return False
        failed = self._group.Get_failed()
        if failed.Get_size() > len(self._dead):
            self._group.Ack_failed()
            everyone = self._group.Get_group()
            self._dead = set(failed.Translate_ranks(list(range(failed.Get_size())), everyone))
            everyone.Free()
        failed.Free()
        return bool(self._dead)
