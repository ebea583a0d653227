"""A rank that dies is noticed by all others at once, whatever they wait for. All ranks are in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from hvdlm.comm.death_watch import DeathWatch, has_died
from hvdlm.comm.failure import DeadRankError
from hvdlm.comm.tcp_connections import TcpConnections

DEADLINE = 20.0  # seconds

Ring = list[tuple[DeathWatch, TcpConnections]]


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ring]:
    """Five ranks, with the connections for their messages."""
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "lo")
    made = [(DeathWatch(), TcpConnections()) for _ in range(5)]
    for rank, (watch, connections) in enumerate(made):
        watch.add(connections)
        watch.watch(rank, made[(rank + 1) % 5][0].endpoint)
        connections.open(rank, [each.endpoint for _, each in made])
    wait_for(lambda: all(len(watch._sockets) == 2 for watch, _ in made))  # each has accepted the one before it
    yield made
    for watch, connections in made:
        watch.close()
        connections.close()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_all_learn_of_a_death_and_nobody_waits(ring: Ring) -> None:
    """Rank 2 dies; rank 0 waits for rank 4, which has never sent it anything and never will."""
    waiting = ring[0][1].receive(memoryview(bytearray(1)), 4)
    ring[2][0].break_()
    wait_for(lambda: all(watch.is_broken for watch, _ in ring))
    with pytest.raises(DeadRankError):
        waiting.result(DEADLINE)
    with pytest.raises(DeadRankError):
        ring[1][1].send(memoryview(b"x"), 3).result(DEADLINE)


def test_a_death_that_a_message_meets_is_told_before_the_next_message_is_sent(ring: Ring) -> None:
    for _, connections in ring[:2]:
        connections.send(memoryview(b"x"), 2).result(DEADLINE)
    ring[2][1].receive(memoryview(bytearray(1)), 1).result(DEADLINE)
    receiving = ring[1][1].receive(memoryview(bytearray(1)), 2)
    ring[2][1].send(memoryview(b"y"), 1).result(DEADLINE)
    receiving.result(DEADLINE)
    receiving = ring[1][1].receive(memoryview(bytearray(1)), 2)
    ring[2][1].close()  # its messages end, its watch does not yet
    with pytest.raises(DeadRankError):
        receiving.result(DEADLINE)
    assert ring[1][0].is_broken
    with pytest.raises(DeadRankError):
        ring[1][1].send(memoryview(b"x"), 0).result(DEADLINE)


def test_what_is_added_later_ends_too(ring: Ring) -> None:
    ring[0][0].break_()
    late = TcpConnections()
    ring[0][0].add(late)
    late.open(0, [late.endpoint])
    with pytest.raises(DeadRankError):
        late.receive(memoryview(bytearray(1)), 0).result(DEADLINE)


def test_a_rank_that_leaves_has_not_died(ring: Ring) -> None:
    ring[3][0].close()
    wait_for(lambda: has_died(ring[3][0].endpoint))
    time.sleep(0.2)
    assert not any(watch.is_broken for watch, _ in ring)
    assert not has_died(ring[2][0].endpoint)


def test_the_next_rank_has_died_before_it_was_watched(ring: Ring) -> None:
    gone = DeathWatch()
    gone.close()
    with pytest.raises(DeadRankError, match=r"rank 0 on .* does not reach the next one"):
        ring[0][0].watch(0, gone.endpoint)
