"""Letters over a TCP connection: their bytes, threads that write and read them, and the notice of a dead other side.

A letter is its length in 8 bytes, then its bytes. A length that no letter has ends the connection.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from hvdlm.arrays import as_array
from hvdlm.comm.mailbox import HEADER_BYTES, LARGEST_LETTER
from hvdlm.comm.tcp_connections import fill

_LENGTH_BYTES = 8

# Probes of a connection on which nothing comes, the last of which must have been answered when the timeout is over
_PROBES = 4
_LONGEST_IDLE = 32767  # seconds, of Linux


def send_letter(connection: socket.socket, message: Tensor) -> None:
    """`message`: (n,) uint8. Raises OSError."""
    connection.sendall(len(message).to_bytes(_LENGTH_BYTES, "little"), socket.MSG_MORE)
    connection.sendall(as_array(message).data)


def receive_letter(connection: socket.socket) -> Tensor:
    """The next one, (n,) uint8. Raises OSError, also where the other side has closed the connection."""
    length = memoryview(bytearray(_LENGTH_BYTES))
    fill(connection, length)
    announced = int.from_bytes(length, "little")
    if not HEADER_BYTES <= announced <= LARGEST_LETTER:
        raise OSError(f"it announces a message of {announced} bytes")
    message = torch.empty(announced, dtype=torch.uint8)
    fill(connection, as_array(message).data)
    return message


def end_when_dead(connection: socket.socket, timeout: float) -> None:
    """Lets operations fail on a connection whose other host has not answered for `timeout` seconds."""
    seconds = max(1, min(int(timeout), _LONGEST_IDLE))
    between = max(1, seconds // (2 * _PROBES))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds - _PROBES * between))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, between)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)  # of what was sent


class LetterConnection:
    """One connection, on which both sides may post at any time."""

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        on_letter: Callable[[Tensor], None],
        on_end: Callable[[str], None],
    ) -> None:
        """`name`: of the other side, for threads. A thread calls `on_letter` with each that arrives; the last one that
        it makes is of `on_end`, once, with the reason why there will be no other.
        """
        self._connection, self._on_letter, self._on_end = connection, on_letter, on_end
        self._outgoing: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unsent = 0
        self._is_over = False  # nothing is sent any more
        self._writer = threading.Thread(target=self._write, name=f"hvdlm-to-{name}", daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, name=f"hvdlm-from-{name}", daemon=True).start()

    def post(self, message: Tensor) -> None:
        """Sends a letter, (n,) uint8, which must stay as it is; if the connection has ended, nothing happens."""
        with self._lock:
            if not self._is_over:
                self._unsent += 1
                self._outgoing.put(message)

    def has_sent(self) -> bool:
        """Whether nothing is left of what was posted, sent or lost."""
        with self._lock:
            return self._unsent == 0

    def end(self) -> None:
        """Sends what was posted, then nothing more: the other side reads that this one has ended."""
        with self._lock:
            self._is_over = True
        self._outgoing.put(None)

    def cut(self) -> None:
        """Ends both directions at once."""
        with self._lock:
            self._is_over, self._unsent = True, 0
        self._outgoing.put(None)
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes threads that send or receive

    def _write(self) -> None:
        try:
            while (message := self._outgoing.get()) is not None:
                send_letter(self._connection, message)
                with self._lock:
                    self._unsent = max(0, self._unsent - 1)
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)
        except OSError:  # the reader says why
            self.cut()

    def _read(self) -> None:
        reason = ""
        try:
            while True:
                self._on_letter(receive_letter(self._connection))
        except OSError as error:
            reason = error.strerror or str(error)
        self.cut()
        self._writer.join()
        self._connection.close()
        self._on_end(reason)
