"""TCP connections between the ranks of a group: messages in order from rank to rank, beside whatever the ranks do.

Each direction between two ranks has a connection of its own, which its first message opens, and a thread on either
side. A message is its length in 8 bytes, then its bytes; nobody reads it before it is waited for, so what TCP has no
room for stays with the sender.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import psutil

from hvdlm.comm.failure import DeadRankError, LostRankError
from hvdlm.comm.startup import STARTUP_TIMEOUT
from hvdlm.errors import HvdlmError

# Seconds for whoever connects to say who it is: a rank does so at once.
_GREETING_TIMEOUT = 1.0

_LENGTH_BYTES = 8
_RANK_BYTES = 4


class Endpoint(NamedTuple):
    """Where a rank listens, and the word by which those that connect show that they belong to its group."""

    host: str  # its name, for sentences
    address: str
    port: int
    token: str


class TcpConnections:
    """This rank's ends of its group's connections, made in two steps: it listens, then it is told of the others."""

    def __init__(self) -> None:
        self._listener = socket.create_server((own_address(os.environ), 0), backlog=4096)
        address, port = self._listener.getsockname()
        self.endpoint = Endpoint(socket.gethostname(), address, port, uuid.uuid4().hex)
        self._lock = threading.Lock()
        self._threads: dict[tuple[str, int], ThreadPoolExecutor] = {}  # one for each direction and rank
        self._outgoing: dict[int, socket.socket] = {}  # by rank; its sender's thread alone opens one
        self._incoming: list[Future[socket.socket]] = []  # by rank
        self._is_closed = self._is_revoked = False
        # Called when another rank is found to have died, before anybody is told: what this one would send next, those
        # that have not noticed it would take for what they wait for
        self.on_death: Callable[[], None] = lambda: None

    def open(self, rank: int, endpoints: Sequence[Endpoint]) -> None:
        """`rank`: this one; `endpoints`: of all ranks, in their order."""
        self._rank, self._endpoints = rank, endpoints
        self._incoming = [Future() for _ in endpoints]
        threading.Thread(target=self._accept, name="hvdlm-tcp-accept", daemon=True).start()

    def send(self, message: memoryview, destination: int) -> Future[None]:
        """Sends `message`, of bytes, which must stay as it is until the future is done.

        It raises LostRankError if the other rank cannot be reached, DeadRankError if it is no longer there.
        """
        return self._submit("to", destination, self._send, message)

    def receive(self, message: memoryview, source: int) -> Future[None]:
        """Fills `message` with the next one of `source`; the future raises DeadRankError if that rank is no longer
        there, HvdlmError if its message has another length.
        """
        return self._submit("from", source, self._receive, message)

    def revoke(self) -> None:
        """Ends all connections, since a rank has died: what is under way and what follows raises DeadRankError."""
        with self._lock:
            self._is_revoked = True
        self.close()

    def close(self) -> None:
        """Ends all connections; whoever still waits for one gets an error."""
        self._is_closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        arrived = [each.result() for each in self._incoming if each.done() and each.exception() is None]
        for connection in [*self._outgoing.values(), *arrived]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes threads that send or receive; what was sent still arrives
            connection.close()
        for thread in self._threads.values():
            thread.shutdown(wait=False)

    def _submit(
        self, direction: str, peer: int, transfer: Callable[[memoryview, int], None], message: memoryview
    ) -> Future[None]:
        with self._lock:
            if self._is_revoked:
                failed: Future[None] = Future()
                failed.set_exception(self._revoked())
                return failed
            if (direction, peer) not in self._threads:
                self._threads[direction, peer] = ThreadPoolExecutor(1, thread_name_prefix=f"hvdlm-{direction}-{peer}")
            return self._threads[direction, peer].submit(transfer, message, peer)

    def _send(self, message: memoryview, destination: int) -> None:
        connection = self._outgoing.get(destination) or self._connect(destination)
        try:
            connection.sendall(len(message).to_bytes(_LENGTH_BYTES, "little"), socket.MSG_MORE)
            connection.sendall(message)
        except OSError as error:
            raise self._lost(destination, error) from error

    def _receive(self, message: memoryview, source: int) -> None:
        connection = self._incoming[source].result()
        length = memoryview(bytearray(_LENGTH_BYTES))
        try:
            fill(connection, length)
            announced = int.from_bytes(length, "little")
            if announced != len(message):
                connection.close()  # what follows would be taken for something else
                raise HvdlmError(
                    f"rank {self._rank} on {self.endpoint.host} received a message of {announced} bytes and expects "
                    f"{len(message)}: another rank is not at the same place; if all ranks have the same settings, data "
                    "set and hvdlm, this is a bug in hvdlm"
                )
            fill(connection, message)
        except OSError as error:
            raise self._lost(source, error) from error

    def _connect(self, destination: int) -> socket.socket:
        """The first connection to a rank. This one shows the other's token, and says who it is."""
        to = self._endpoints[destination]
        try:
            connection = socket.create_connection((to.address, to.port), timeout=STARTUP_TIMEOUT)
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            greet(connection, to.token, self._rank)
        except OSError as error:
            kind = LostRankError
            if isinstance(error, ConnectionRefusedError):
                kind = DeadRankError
                self.on_death()
            raise kind(
                f"rank {self._rank} on {self.endpoint.host} does not reach rank {destination} on {to.host} at "
                f"{to.address}:{to.port} ({error.strerror or error}): it has ended, or a firewall is between the "
                "hosts, or horovodrun needs --network-interfaces"
            ) from error
        self._outgoing[destination] = connection
        return connection

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                reason = "it is closed" if self._is_closed else error.strerror
                said = HvdlmError(f"rank {self._rank} on {self.endpoint.host} accepts no connections: {reason}")
                for each in self._incoming:
                    if not each.done():
                        each.set_exception(self._revoked() if self._is_revoked else said)
                return
            source = greeting(connection, self.endpoint.token)
            if source is not None and source >= len(self._endpoints):
                source = None
            if source is None or self._incoming[source].done():
                connection.close()  # not of this group
            else:
                self._incoming[source].set_result(connection)

    def _lost(self, peer: int, reason: OSError) -> DeadRankError:
        if self._is_revoked:
            return self._revoked()
        self.on_death()
        return DeadRankError(
            f"rank {self._rank} on {self.endpoint.host} has lost the connection with rank {peer} on "
            f"{self._endpoints[peer].host}: {reason.strerror or reason}"
        )

    def _revoked(self) -> DeadRankError:
        return DeadRankError(f"rank {self._rank} on {self.endpoint.host}: another rank has died")


def greet(connection: socket.socket, token: str, rank: int) -> None:
    """Shows the token of whoever has accepted `connection`, and says who this is. Raises OSError."""
    connection.sendall(token.encode() + rank.to_bytes(_RANK_BYTES, "little"))


def greeting(connection: socket.socket, token: str) -> int | None:
    """The rank that has connected; None if it does not show the `token`."""
    received = memoryview(bytearray(len(token) + _RANK_BYTES))
    with suppress(OSError):
        connection.settimeout(_GREETING_TIMEOUT)
        fill(connection, received)
        connection.settimeout(None)
        if secrets.compare_digest(received[:-_RANK_BYTES], token.encode()):
            return int.from_bytes(received[-_RANK_BYTES:], "little")
    return None


def own_address(environment: Mapping[str, str]) -> str:
    """The IPv4 address of this host by which Horovod's ranks reach it: on the interface that horovodrun has found.

    Without HOROVOD_GLOO_IFACE, that towards horovodrun's key-value store. Raises HvdlmError if there is none.
    """
    name = environment.get("HOROVOD_GLOO_IFACE")
    if not name:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((environment["HOROVOD_GLOO_RENDEZVOUS_ADDR"], 9))  # chooses a route; sends nothing
            return str(probe.getsockname()[0])
    for entry in psutil.net_if_addrs().get(name, []):
        if entry.family == socket.AF_INET:
            return str(entry.address)
    raise HvdlmError(
        f"{socket.gethostname()} has no IPv4 address on {name} (HOROVOD_GLOO_IFACE), by which ranks exchange messages: "
        "give another interface to horovodrun --network-interfaces"
    )


def fill(connection: socket.socket, message: memoryview) -> None:
    """Receives as many bytes as `message` has. Raises OSError, also where the other side has closed the connection."""
    while len(message):
        count = connection.recv_into(message, 0, socket.MSG_WAITALL)
        if count == 0:
            raise ConnectionResetError("it has closed the connection")
        message = message[count:]
