"""Connections round the ring of ranks, by whose end a death is noticed on all ranks at once, whatever they do.

Each rank keeps one to the next. The system ends those of a process that has died; a rank of which one ends ends its own
other one, and so all ranks learn of it, one after the other. With them end all connections by which ranks exchange
messages, so nobody waits for one that never comes.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from contextlib import suppress

from hvdlm.comm.failure import DeadRankError, LostRankError
from hvdlm.comm.tcp_connections import Endpoint, TcpConnections, greet, greeting, own_address

# Seconds for a process on another host to accept a connection
_TIMEOUT = 20.0

_LEAVES = b"."


class DeathWatch:
    """Of one rank, in one group of ranks. It listens from the beginning, so that others see whether this one lives."""

    def __init__(self) -> None:
        self._listener = socket.create_server((own_address(os.environ), 0), backlog=4096)
        address, port = self._listener.getsockname()
        self.endpoint = Endpoint(socket.gethostname(), address, port, uuid.uuid4().hex)
        self._lock, self._breaking = threading.Lock(), threading.Lock()
        self._sockets: list[socket.socket] = []  # to the next rank, and from the one before
        self._connections: list[TcpConnections] = []
        self._has_ended = False
        self.is_broken = False  # whether some rank of the group has died, as far as is known here
        threading.Thread(target=self._accept, name="hvdlm-death-watch", daemon=True).start()

    def watch(self, rank: int, following: Endpoint) -> None:
        """Watches the rank that follows this one, which is `rank`. Raises DeadRankError if it has died."""
        try:
            connection = socket.create_connection((following.address, following.port), timeout=_TIMEOUT)
            connection.settimeout(None)
            greet(connection, following.token, rank)
        except OSError as error:
            kind = DeadRankError if isinstance(error, ConnectionError) else LostRankError
            raise kind(
                f"rank {rank} on {self.endpoint.host} does not reach the next one on {following.host} at "
                f"{following.address}:{following.port} ({error.strerror or error})"
            ) from error
        self._monitor(connection)

    def add(self, connections: TcpConnections) -> None:
        """Lets `connections` end when a rank dies, or now if one has; a death that they notice is one for all."""
        connections.on_death = self.break_
        with self._lock:
            self._connections.append(connections)
            is_broken = self.is_broken
        if is_broken:
            connections.revoke()

    def break_(self) -> None:
        """Ends all connections of this rank, and thereby those of the others; they have ended when it returns."""
        with self._breaking:
            with self._lock:
                if self._has_ended:
                    return
                self._has_ended = self.is_broken = True
                connections = list(self._connections)
            self._end(b"")
            for each in connections:
                each.revoke()

    def close(self) -> None:
        """Leaves the ring, without a death."""
        with self._lock:
            self._has_ended = True
        self._end(_LEAVES)

    def _end(self, last_words: bytes) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with suppress(OSError):
                each.sendall(last_words)
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if greeting(connection, self.endpoint.token) is None:
                connection.close()  # a stranger, or a rank that asks whether this one lives
            else:
                self._monitor(connection)

    def _monitor(self, connection: socket.socket) -> None:
        def run() -> None:
            with suppress(OSError):
                if connection.recv(len(_LEAVES)):
                    return
            self.break_()

        with self._lock:
            if self._has_ended:
                with suppress(OSError):
                    connection.sendall(b"" if self.is_broken else _LEAVES)
                connection.close()
                return
            self._sockets.append(connection)
        threading.Thread(target=run, name="hvdlm-death-watch", daemon=True).start()


def has_died(endpoint: Endpoint) -> bool:
    """Whether nobody listens there any more; False where that cannot be told."""
    try:
        socket.create_connection((endpoint.address, endpoint.port), timeout=_TIMEOUT).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
