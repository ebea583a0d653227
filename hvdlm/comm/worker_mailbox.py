"""The mailbox of a worker that is a process of its own: letters to and from its server alone."""

from __future__ import annotations

import math
import queue
import socket
import threading
from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from hvdlm.comm.letter_connection import LetterConnection, end_when_dead
from hvdlm.comm.mailbox import Letter, Mailbox, letter_of
from hvdlm.comm.server_mailbox import SERVER
from hvdlm.errors import HvdlmError

# Seconds for the server to read that this worker leaves
_SECONDS_TO_LEAVE = 5.0


class LeavingError(HvdlmError):
    """This worker was asked to stop, and waits no longer."""


class ServerGoneError(HvdlmError):
    """The connection has ended, and the server has not said that it would."""


class WorkerMailbox(Mailbox):
    """It waits for the server as long as that lives: others may be at work, or it validates."""

    def __init__(
        self,
        connection: socket.socket,
        number: int,
        server: str,
        timeout: float,
        stop_requested: Callable[[], bool],
    ) -> None:
        """`connection`: with the `server`, of that name, which has given this worker its `number`. `timeout`: seconds
        after which the server has died if its host does not answer.
        """
        super().__init__(math.inf)
        self.rank, self.size = number, SERVER + 1
        self._server, self._stop_requested = server, stop_requested
        self._arrived: queue.SimpleQueue[Letter] = queue.SimpleQueue()
        self._lost: str | None = None
        self._has_ended = threading.Event()
        end_when_dead(connection, timeout)
        self._connection = LetterConnection(
            connection, "server", lambda message: self._arrived.put(letter_of(message, SERVER)), self._note_end
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
        return self._connection.has_sent()

    def dead(self) -> Collection[int]:
        return ()

    def close(self) -> None:
        """Returns when the server has read all that was posted, and closes the connection; or after some seconds."""
        self._connection.end()
        self._has_ended.wait(_SECONDS_TO_LEAVE)
        self._connection.cut()

    def _post(self, message: Tensor, destinations: Sequence[int]) -> None:
        self._connection.post(message)

    def _note_end(self, reason: str) -> None:
        self._lost = reason
        self._has_ended.set()
