"""Letters from any process to any other, whenever one is posted: what collectives and matched messages cannot do.

A communicator's ranks know who sends next. A server does not: it takes what comes, from whomever it comes. A mailbox
stands beside a communicator, with messages of its own, and its operations are no collectives, but for opening it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import DeadRankError, wait_until
from hvdlm.errors import HvdlmError

# Numbers in front of what a letter carries: what kind it is, and what else whoever sends it wants to say
Header = tuple[int, int, int, int]

HEADER_BYTES = 32

# Of a letter: MPI counts in 32 bits
LARGEST_LETTER = 2**30


class Letter(NamedTuple):
    """What has arrived."""

    source: int  # the rank that has posted it
    header: Header
    data: Tensor  # (n,) uint8

    @property
    def kind(self) -> int:
        return self.header[0]


class Mailbox(ABC):
    """This rank's letters to and from the others. Letters from one rank to another arrive in their order.

    One thread takes letters; any may post.
    """

    rank: int
    size: int

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds that a rank waits for another before it gives up."""
        self._timeout = timeout

    def post(self, destinations: Iterable[int], header: Sequence[int], data: Tensor | None = None) -> None:
        """Sends a letter, whose `data` (any dtype and shape, on the CPU) may then change; returns at once.

        Raises HvdlmError if it is too long.
        """
        content = torch.empty(0) if data is None else data.detach().reshape(-1).contiguous()
        content = content.view(torch.uint8)
        if HEADER_BYTES + len(content) > LARGEST_LETTER:
            raise HvdlmError(
                f"a message of {len(content)} bytes is more than the {LARGEST_LETTER} that one may have: start more "
                "servers, among which a parameter is divided"
            )
        numbers = torch.tensor([*header, *[0] * (4 - len(header))], dtype=torch.int64)
        self._post(torch.cat([numbers.view(torch.uint8), content]), list(destinations))

    @abstractmethod
    def _post(self, message: Tensor, destinations: Sequence[int]) -> None:
        """`message`, (n,) uint8, stays as it is."""

    @abstractmethod
    def take(self) -> Letter | None:
        """The next letter that has arrived, if there is one."""

    @abstractmethod
    def has_sent(self) -> bool:
        """Whether all that was posted has left this rank."""

    @abstractmethod
    def dead(self) -> Collection[int]:
        """Ranks that are known to have died. Where a death ends the whole job, none are."""

    @abstractmethod
    def close(self) -> None:
        """Once all has been taken. Every rank that lives closes its own."""

    def receive(self, what: str, needed: Collection[int] = (), is_patient: bool = False) -> Letter:
        """The next letter, for which this rank waits because it needs `what`.

        Raises LostRankError after the timeout, unless it `is_patient`; DeadRankError if one of the ranks `needed` has
        died.
        """
        letter: Letter | None = None

        def has_come() -> bool:
            nonlocal letter
            letter = self.take()
            if letter is None and needed and (gone := sorted(set(needed) & set(self.dead()))):
                raise DeadRankError(f"rank {self.rank} waits for {what}, but rank {gone[0]} has died")
            return letter is not None

        wait_until(has_come, math.inf if is_patient else self._timeout, self.rank, what)
        assert letter is not None
        return letter

    def receive_unless(self, is_due: Callable[[], bool], what: str) -> Letter | None:
        """The next letter, for which this rank waits however long it takes, since it needs `what`; None if none is here
        and something else `is_due`. That is asked first: what came before it became due is then here.
        """
        letter: Letter | None = None

        def is_over() -> bool:
            nonlocal letter
            is_other = is_due()
            letter = self.take()
            return letter is not None or is_other

        wait_until(is_over, math.inf, self.rank, what)
        return letter

    def flush(self) -> None:
        """Returns when all that was posted has left. Raises LostRankError after the timeout."""
        wait_until(self.has_sent, self._timeout, self.rank, "another rank to take a message")


def letter_of(message: Tensor, source: int) -> Letter:
    """What `Mailbox._post` was given, (n,) uint8, as it has arrived."""
    kind, first, second, third = message[:HEADER_BYTES].view(torch.int64).tolist()
    return Letter(source, (kind, first, second, third), message[HEADER_BYTES:])


def open_mailbox(communicator: Communicator, timeout: float) -> Mailbox:
    """A mailbox of all ranks of a communicator: over MPI with engine mpi, otherwise over TCP. Collective."""
    if communicator.engine == "mpi":
        from hvdlm.comm.mpi import MPICommunicator
        from hvdlm.comm.mpi_mailbox import MPIMailbox

        assert isinstance(communicator, MPICommunicator)
        return MPIMailbox(communicator.duplicate(), timeout)
    from hvdlm.comm.tcp_mailbox import TcpMailbox

    return TcpMailbox(communicator, timeout)
