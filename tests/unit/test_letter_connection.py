"""Letters over a TCP connection: both ways, in order, of a bounded length, and what is told of its end."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import torch
from torch import Tensor

from hvdlm.comm.letter_connection import LetterConnection, end_when_dead
from hvdlm.comm.mailbox import HEADER_BYTES, LARGEST_LETTER

DEADLINE = 20.0


class Side:
    """One end, with what it has received, and why that ended."""

    def __init__(self, connection: socket.socket) -> None:
        self.letters: queue.Queue[Tensor] = queue.Queue()
        self.reason: queue.Queue[str] = queue.Queue()
        self.connection = LetterConnection(connection, "other", self.letters.put, self.reason.put)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=DEADLINE)
        other, _ = listener.accept()
        one.settimeout(None)
        yield one, other


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def letter(count: int) -> Tensor:
    """(n,) uint8, at least as long as a header."""
    return (torch.arange(HEADER_BYTES + count * 100_000) % 251).to(torch.uint8)


def test_letters_go_both_ways_in_order(sockets: tuple[socket.socket, socket.socket]) -> None:
    one, other = map(Side, sockets)
    for count in range(5):
        one.connection.post(letter(count))
        other.connection.post(letter(count + 1))
    for count in range(5):
        assert other.letters.get(timeout=DEADLINE).equal(letter(count))
        assert one.letters.get(timeout=DEADLINE).equal(letter(count + 1))
    until(one.connection.has_sent)
    one.connection.cut()


def test_the_end_comes_after_what_was_posted(sockets: tuple[socket.socket, socket.socket]) -> None:
    """Then the other side is told, and nothing that is posted later counts as unsent."""
    one, other = map(Side, sockets)
    one.connection.post(letter(30))
    one.connection.end()
    assert other.reason.get(timeout=DEADLINE) == "it has closed the connection"
    assert other.letters.get_nowait().equal(letter(30))
    one.connection.post(letter(0))
    assert one.connection.has_sent()
    assert one.reason.get(timeout=DEADLINE) == "it has closed the connection"
    assert not [each for each in threading.enumerate() if each.name.endswith("-other") and not each.daemon]


def test_a_cut_connection_leaves_nothing_to_send(sockets: tuple[socket.socket, socket.socket]) -> None:
    one = Side(sockets[0])
    for _ in range(5):
        one.connection.post(letter(200))  # more than TCP takes, of which the other side reads nothing
    assert not one.connection.has_sent()
    one.connection.cut()
    assert one.connection.has_sent()
    one.reason.get(timeout=DEADLINE)


@pytest.mark.parametrize("length", [0, HEADER_BYTES - 1, LARGEST_LETTER + 1, 2**64 - 1])
def test_a_length_that_no_letter_has(length: int, sockets: tuple[socket.socket, socket.socket]) -> None:
    """Ends the connection before anything is made room for."""
    one = Side(sockets[0])
    sockets[1].sendall(length.to_bytes(8, "little") + bytes(100))
    assert one.reason.get(timeout=DEADLINE) == f"it announces a message of {length} bytes"
    assert one.letters.empty()


@pytest.mark.parametrize("timeout", [0.5, 3, 60, 300, 1e6])
def test_probes_are_over_within_the_timeout(timeout: float, sockets: tuple[socket.socket, socket.socket]) -> None:
    """Linux counts in whole seconds, of which it takes one for the idle time and one between probes at least."""
    end_when_dead(sockets[0], timeout)
    idle, between, count = (
        sockets[0].getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    assert sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert idle + between * count <= max(timeout, 5)
    unanswered = sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
    assert unanswered <= max(timeout, 1)
