"""The mailbox of a worker that is a process of its own: letters to and from its servers alone."""

from __future__ import annotations

import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from hvdlm.comm.letter_connection import LetterConnection, end_when_dead
from hvdlm.comm.mailbox import Letter, Mailbox, letter_of
from hvdlm.comm.server_mailbox import SERVER
from hvdlm.errors import HvdlmError

# Seconds for servers to read that this worker leaves
_SECONDS_TO_LEAVE = 5.0


class LeavingError(HvdlmError):
    """This worker was asked to stop, and waits no longer."""


class ServerGoneError(HvdlmError):
    """The connection has ended, and the server has not said that it would."""


class WorkerMailbox(Mailbox):
    """It waits for servers as long as they live: others may be at work, or servers validate."""

    def __init__(
        self,
        connections: Sequence[socket.socket],
        number: int,
        server: str,
        timeout: float,
        stop_requested: Callable[[], bool],
    ) -> None:
        """`connections`: with all servers, of which the first, at the address `server`, has given this worker its
        `number`. `timeout`: seconds after which a server has died if its host does not answer.
        """
        super().__init__(math.inf)
        self.rank, self.size = number, SERVER + len(connections)
        self._server, self._stop_requested = server, stop_requested
        self._arrived: queue.SimpleQueue[Letter] = queue.SimpleQueue()
        self._lost: str | None = None  # why no more can come of one of them
        self._ends = [threading.Event() for _ in connections]
        self._connections = [self._open(index, each, timeout) for index, each in enumerate(connections)]

    def _open(self, index: int, connection: socket.socket, timeout: float) -> LetterConnection:
        end_when_dead(connection, timeout)
        return LetterConnection(
            connection,
            f"server-{index}",
            lambda message: self._arrived.put(letter_of(message, SERVER + index)),
            lambda reason: self._note_end(index, reason),
        )

    def take(self) -> Letter | None:
        """Raises LeavingError if there is none and this worker is asked to stop, ServerGoneError if none can come."""
        lost = self._lost
        try:
            return self._arrived.get_nowait()
        except queue.Empty:
            if lost is not None:
                raise ServerGoneError(
                    f"the server at {self._server} has gone: {lost}; start it again with hvdlm serve and --resume "
                    "latest, then its workers"
                ) from None
            if self._stop_requested():
                raise LeavingError("this worker was asked to stop") from None
            return None

    def has_sent(self) -> bool:
        return all(each.has_sent() for each in self._connections)

    def dead(self) -> Collection[int]:
        return ()

    def close(self) -> None:
        """Returns when servers have read all that was posted, and closes the connections; or after some seconds."""
        for each in self._connections:
            each.end()
        end = time.monotonic() + _SECONDS_TO_LEAVE
        for has_ended in self._ends:
            has_ended.wait(max(0.0, end - time.monotonic()))
        for each in self._connections:
            each.cut()

    def _post(self, message: Tensor, destinations: Sequence[int]) -> None:
        for destination in destinations:
            self._connections[destination - SERVER].post(message)

    def _note_end(self, index: int, reason: str) -> None:
        self._lost = reason if index == 0 else f"server {index} has ended its connection ({reason})"
        self._ends[index].set()
