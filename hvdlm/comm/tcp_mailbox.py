"""A mailbox over TCP, for engines whose messages have to be expected by whom they come from.

A connection leads from each rank to each that it has posted a letter to. A thread writes to it, another reads from it,
so that letters arrive whatever their rank does.
"""

from __future__ import annotations

import queue
import socket
import threading
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress

from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.failure import LostRankError
from hvdlm.comm.interfaces import own_interfaces
from hvdlm.comm.letter_connection import receive_letter, send_letter
from hvdlm.comm.mailbox import Letter, Mailbox, letter_of
from hvdlm.comm.tcp_connections import greet, greeting

# Seconds for one address of a host to answer
_CONNECT_TIMEOUT = 5.0


class TcpMailbox(Mailbox):
    """Ranks of any communicator."""

    def __init__(self, communicator: Communicator, timeout: float) -> None:
        """Collective."""
        super().__init__(timeout)
        self.rank, self.size = communicator.rank, communicator.size
        self._hosts = communicator.hosts
        self._listener = socket.create_server(("", 0), backlog=4096)
        addresses = [str(each.address.ip) for each in own_interfaces()]
        own = addresses, self._listener.getsockname()[1], uuid.uuid4().hex
        self._endpoints: list[tuple[list[str], int, str]] = communicator.all_gather_object(own)
        self._arrived: queue.Queue[Letter | Exception] = queue.Queue()
        self._outgoing: dict[int, queue.Queue[Tensor | None]] = {}
        self._lock = threading.Lock()
        self._unsent = 0
        self._is_closed = False
        threading.Thread(target=self._accept, name="hvdlm-mailbox", daemon=True).start()

    def _post(self, message: Tensor, destinations: Sequence[int]) -> None:
        with self._lock:
            for destination in destinations:
                self._unsent += 1
                if destination not in self._outgoing:
                    self._outgoing[destination] = queue.Queue()
                    name = f"hvdlm-mailbox-to-{destination}"
                    threading.Thread(target=self._write, args=(destination,), name=name, daemon=True).start()
                self._outgoing[destination].put(message)

    def take(self) -> Letter | None:
        try:
            found = self._arrived.get_nowait()
        except queue.Empty:
            return None
        if isinstance(found, Exception):
            raise found
        return found

    def has_sent(self) -> bool:
        with self._lock:
            return self._unsent == 0

    def dead(self) -> Collection[int]:
        return ()

    def close(self) -> None:
        self.flush()
        self._is_closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        with self._lock:
            for letters in self._outgoing.values():
                letters.put(None)

    def _write(self, destination: int) -> None:
        try:
            with self._connect(destination) as connection:
                while (message := self._outgoing[destination].get()) is not None:
                    send_letter(connection, message)
                    with self._lock:
                        self._unsent -= 1
        except OSError as error:
            self._fail(destination, error)

    def _connect(self, destination: int) -> socket.socket:
        """Over the first address at which that rank answers. Raises OSError if it does so at none."""
        addresses, port, token = self._endpoints[destination]
        if self._hosts[destination] == self._hosts[self.rank]:
            addresses = ["127.0.0.1"]
        failure = OSError("it has no address")
        for address in addresses:
            try:
                connection = socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT)
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                greet(connection, token, self.rank)
                return connection
            except OSError as error:
                failure = error
        raise failure

    def _accept(self) -> None:
        token = self._endpoints[self.rank][2]
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # it is closed
            source = greeting(connection, token)
            if source is None or source >= self.size:
                connection.close()  # not of this job
                continue
            name = f"hvdlm-mailbox-from-{source}"
            threading.Thread(target=self._read, args=(connection, source), name=name, daemon=True).start()

    def _read(self, connection: socket.socket, source: int) -> None:
        with connection:
            try:
                while True:
                    self._arrived.put(letter_of(receive_letter(connection), source))
            except ConnectionResetError:
                return  # it has posted its last letter; whoever waits for another one gives up after the timeout
            except OSError as error:
                self._fail(source, error)

    def _fail(self, other: int, error: OSError) -> None:
        if not self._is_closed:
            said = f"rank {self.rank} has lost the connection with rank {other} on {self._hosts[other]}"
            self._arrived.put(LostRankError(f"{said}: {error.strerror or error}"))
