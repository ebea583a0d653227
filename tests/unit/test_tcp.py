"""TCP connections between ranks: order, lengths, strangers, and ranks that are gone. Both ends are in this process."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from hvdlm.comm import tcp_connections
from hvdlm.comm.failure import LostRankError
from hvdlm.comm.tcp_connections import TcpConnections, own_address
from hvdlm.errors import HvdlmError

LOOPBACK = "127.0.0.1"
DEADLINE = 20.0  # seconds

Connect = Callable[[int], list[TcpConnections]]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Makes a group of some ranks; all are closed at the end."""
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "lo")
    made: list[TcpConnections] = []

    def make(size: int) -> list[TcpConnections]:
        group = [TcpConnections() for _ in range(size)]
        made.extend(group)
        for rank, each in enumerate(group):
            each.open(rank, [other.endpoint for other in group])
        return group

    yield make
    for each in made:
        each.close()


def receive(connections: TcpConnections, length: int, source: int) -> tuple[bytearray, Future[None]]:
    target = bytearray(length)
    return target, connections.receive(memoryview(target), source)


def test_messages_arrive_in_order_whoever_comes_first(connect: Connect) -> None:
    zero, one, two = connect(3)
    large = bytes(range(256)) * 40_000  # more than TCP keeps for a receiver
    early = [receive(one, 3, source) for source in (0, 2, 0)]
    sent = [zero.send(memoryview(message), 1) for message in (b"abc", b"def", large)]
    sent.append(two.send(memoryview(b"xyz"), 1))
    late = receive(one, len(large), 0)
    for expected, (target, future) in zip((b"abc", b"xyz", b"def", large), [*early, late], strict=True):
        future.result(DEADLINE)
        assert target == expected
    for future in sent:
        future.result(DEADLINE)


def test_a_message_of_another_length(connect: Connect) -> None:
    zero, one = connect(2)
    zero.send(memoryview(b"abcd"), 1)
    _, future = receive(one, 3, 0)
    with pytest.raises(HvdlmError, match=r"^rank 1 on \S+ received a message of 4 bytes and expects 3: another"):
        future.result(DEADLINE)
    assert not isinstance(future.exception(), LostRankError)
    _, next_one = receive(one, 4, 0)  # what follows is not taken for a message
    with pytest.raises(LostRankError):
        next_one.result(DEADLINE)


def test_a_rank_that_is_gone(connect: Connect) -> None:
    """Its last message still arrives; then whoever waits for it, or sends to it, hears of it."""
    zero, one = connect(2)
    one.send(memoryview(b"hello"), 0).result(DEADLINE)
    zero.send(memoryview(b"hello"), 1).result(DEADLINE)
    _, future = receive(one, 5, 0)
    future.result(DEADLINE)
    one.close()
    last, future = receive(zero, 5, 1)
    future.result(DEADLINE)
    assert last == b"hello"
    host = socket.gethostname()
    _, future = receive(zero, 5, 1)
    with pytest.raises(LostRankError, match=f"rank 0 on {host} has lost the connection with rank 1 on {host}: it has"):
        future.result(DEADLINE)
    with pytest.raises(LostRankError, match=f"rank 0 on {host} has lost the connection with rank 1 on {host}: "):
        for _ in range(100):  # what TCP has room for is taken
            zero.send(memoryview(bytes(2**20)), 1).result(DEADLINE)


def test_a_rank_that_cannot_be_reached(connect: Connect) -> None:
    zero, one = connect(2)
    one.close()
    with pytest.raises(LostRankError, match=r"does not reach rank 1 on \S+ at 127.0.0.1:\d+ \(Connection refused\): "):
        zero.send(memoryview(b"abc"), 1).result(DEADLINE)


def test_who_waits_while_this_rank_closes_is_woken(connect: Connect) -> None:
    zero, one = connect(2)
    one.send(memoryview(b"abc"), 0).result(DEADLINE)
    _, future = receive(zero, 3, 1)
    future.result(DEADLINE)
    on_a_connection, for_a_connection = receive(zero, 3, 1)[1], receive(one, 3, 0)[1]
    zero.close()
    with pytest.raises(LostRankError):
        on_a_connection.result(DEADLINE)
    one.close()
    with pytest.raises(HvdlmError):
        for_a_connection.result(DEADLINE)


def test_strangers_are_turned_away(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that say nothing, something else, another group's token, or a rank that this one has not."""
    monkeypatch.setattr(tcp_connections, "_GREETING_TIMEOUT", 0.1)
    zero, one = connect(2)
    token = one.endpoint.token
    for greeting in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n".ljust(100),
        token[::-1].encode() + bytes(4),
        token.encode() + b"\2",
    ):
        padded = greeting.ljust(len(token) + 4, b"\0") if greeting else b""
        with socket.create_connection((LOOPBACK, one.endpoint.port), timeout=DEADLINE) as stranger:
            stranger.sendall(padded + struct.pack("<Q", 3) + b"bad" if padded else b"")
            stranger.settimeout(DEADLINE)
            try:
                assert stranger.recv(1) == b""
            except ConnectionResetError:
                continue
    zero.send(memoryview(b"abc"), 1)
    target, future = receive(one, 3, 0)
    future.result(DEADLINE)
    assert target == b"abc"


def test_own_address() -> None:
    assert own_address({"HOROVOD_GLOO_IFACE": "lo"}) == LOOPBACK
    assert own_address({"HOROVOD_GLOO_RENDEZVOUS_ADDR": LOOPBACK}) == LOOPBACK
    with pytest.raises(HvdlmError, match=r"has no IPv4 address on eth77 \(HOROVOD_GLOO_IFACE\).*--network-interfaces"):
        own_address({"HOROVOD_GLOO_IFACE": "eth77", "HOROVOD_GLOO_RENDEZVOUS_ADDR": LOOPBACK})
