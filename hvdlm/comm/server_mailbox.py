"""The mailbox of a server that is a process of its own: workers connect to it and leave at any time.

A worker has a number that no other has had before, the same on all servers, which come after all workers. Letters
between servers go by a mailbox of their own.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from hvdlm.comm.admission import Admission, admit, introduction, refuse
from hvdlm.comm.failure import LostRankError
from hvdlm.comm.letter_connection import LetterConnection, end_when_dead
from hvdlm.comm.mailbox import Letter, Mailbox, letter_of
from hvdlm.errors import HvdlmError

# The number of the first server: workers have those below
SERVER = 2**31

# Connections that are looked at at a time, of whom none needs to be a worker
_MOST_STRANGERS = 16

# Seconds until a host may have room for another connection that had none
_SECONDS_TO_RECOVER = 0.2

# Seconds for workers to read why the server ends
_SECONDS_TO_END = 5.0


class ServerMailbox(Mailbox):
    """Letters to and from workers, and other servers."""

    def __init__(self, host: str, port: int, timeout: float, servers: Mailbox | None = None) -> None:
        """Listens; workers are not answered before `open`. Raises HvdlmError if it cannot.

        `timeout`: seconds after which a worker has died whose host does not answer. `servers`: of all servers, if
        there are several; it is closed with this one.
        """
        super().__init__(timeout)
        self._servers = servers
        self.rank, self.size = (SERVER + servers.rank, SERVER + servers.size) if servers else (SERVER, SERVER + 1)
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._listener = socket.create_server(address, family=family, backlog=4096)
        except (OSError, OverflowError) as error:  # the latter of a port that is too high
            reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
            raise HvdlmError(
                f"cannot listen at server.listen = {host}:{port}: {reason}; give an address of this host, with a port "
                "that is free"
            ) from None
        self.address: str = self._listener.getsockname()[0]
        self.port: int = self._listener.getsockname()[1]
        self.sent_bytes = 0
        self._arrived: queue.SimpleQueue[Letter] = queue.SimpleQueue()
        self._workers: dict[int, LetterConnection] = {}
        self._addresses: dict[int, str] = {}  # also of those that have gone
        self._dead: set[int] = set()
        self._lock = threading.Lock()
        self._strangers = threading.BoundedSemaphore(_MOST_STRANGERS)

    def open(self, token: str, answer: Callable[[dict[str, Any]], Admission | str | None]) -> None:
        """Takes workers from now on that know the `token`.

        `answer`: to one that says so much of itself: what it is told, or why it is not wanted; None: nothing. Threads
        call it.
        """
        self._token, self._answer = token, answer
        threading.Thread(target=self._accept, name="hvdlm-server-accept", daemon=True).start()

    def name_of(self, worker: int) -> str:
        """For sentences, also of one that has gone."""
        return f"worker {worker} at {self._addresses[worker]}"

    def disconnect(self, worker: int) -> None:
        """Ends the connection with a worker, which then counts as dead."""
        with self._lock:
            found = self._workers.get(worker)
        if found:
            found.cut()

    def take(self) -> Letter | None:
        """Raises LostRankError if another server is known to have died: each has a part of the model."""
        if self._servers is not None:
            if dead := sorted(self._servers.dead()):
                raise LostRankError(f"server {dead[0]} has died: start all again with --resume latest")
            if (found := self._servers.take()) is not None:
                return found._replace(source=SERVER + found.source)
        try:
            return self._arrived.get_nowait()
        except queue.Empty:
            return None

    def has_sent(self) -> bool:
        has_told_servers = self._servers is None or self._servers.has_sent()
        return has_told_servers and all(each.has_sent() for each in self._connected())

    def dead(self) -> Collection[int]:
        with self._lock:
            return set(self._dead)

    def end(self, header: Sequence[int]) -> None:
        """Tells all workers, with a letter, that the server ends; they have some seconds to read it."""
        self._stop_listening()
        with self._lock:
            numbers = list(self._workers)
        self.post(numbers, header)
        for each in self._connected():
            each.end()
        end = time.monotonic() + _SECONDS_TO_END
        while self._connected() and time.monotonic() < end:
            time.sleep(0.01)
        for each in self._connected():
            each.cut()

    def close(self) -> None:
        self._stop_listening()
        for each in self._connected():
            each.cut()
        if self._servers is not None:
            self._servers.close()

    def _connected(self) -> list[LetterConnection]:
        with self._lock:
            return list(self._workers.values())

    def _stop_listening(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _post(self, message: Tensor, destinations: Sequence[int]) -> None:
        if self._servers is not None:
            self._servers._post(message, [each - SERVER for each in destinations if each >= SERVER])
        for destination in destinations:
            with self._lock:
                found = self._workers.get(destination)
            if found:
                found.post(message)
                self.sent_bytes += len(message)

    def _accept(self) -> None:
        while True:
            self._strangers.acquire()
            try:
                connection, address = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return  # it is closed
                self._strangers.release()
                time.sleep(_SECONDS_TO_RECOVER)
                continue
            arguments = (connection, str(address[0]))
            threading.Thread(target=self._receive, args=arguments, name="hvdlm-server-admits", daemon=True).start()

    def _receive(self, connection: socket.socket, address: str) -> None:
        """Lets a worker in."""
        try:
            with suppress(OSError):
                said = introduction(connection, self._token)
                answer = None if said is None else self._answer(said)
                if isinstance(answer, str):
                    refuse(connection, answer)
                elif answer is not None and self._admit(connection, address, answer):
                    return
            connection.close()
        finally:
            self._strangers.release()

    def _admit(self, connection: socket.socket, address: str, admission: Admission) -> bool:
        """Returns whether it is let in: not under a number that another has had. Raises OSError."""
        end_when_dead(connection, self._timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number = admission.number
        with self._lock:  # whatever the first server has sent for it goes to nobody before it is known here
            if number in self._addresses or number >= SERVER:
                return False
            self._addresses[number] = address
            admit(connection, admission)
            self._workers[number] = LetterConnection(
                connection,
                f"worker-{number}",
                lambda message: self._arrived.put(letter_of(message, number)),
                lambda reason: self._note_end(number),
            )
        return True

    def _note_end(self, worker: int) -> None:
        with self._lock:
            self._workers.pop(worker, None)
            self._dead.add(worker)
