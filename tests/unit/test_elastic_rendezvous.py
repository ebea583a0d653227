"""Ranks that meet by the key-value store of an elastic horovodrun, of which this is a small one of our own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hvdlm.comm import elastic_rendezvous
from hvdlm.comm.elastic_rendezvous import ElasticRendezvous, Member, starts_elastically
from hvdlm.comm.failure import DeadRankError, LeftOutError, LostRankError
from hvdlm.comm.tcp_connections import Endpoint

DEADLINE = 20.0  # seconds


class Store(ThreadingHTTPServer):
    """Keeps what is put, and answers `rank_and_size` by `places`."""

    daemon_threads = True

    def __init__(self) -> None:
        values: dict[str, bytes] = {}
        self.values = values

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                values[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.end_headers()

            def do_GET(self) -> None:
                value = values.get(self.path)
                self.send_response(404 if value is None else 200)
                self.end_headers()
                self.wfile.write(value or b"")

            def log_message(self, format: str, *arguments: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def rendezvous(self, rank: int, size: int, timeout: float = DEADLINE) -> ElasticRendezvous:
        return ElasticRendezvous(environment(self.server_address[1], rank, size), timeout)


def environment(port: int, rank: int, size: int) -> dict[str, str]:
    """What horovodrun sets."""
    return {
        "HOROVOD_ELASTIC": "1",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_HOSTNAME": "node",
        "HOROVOD_RANK": str(rank),
        "HOROVOD_SIZE": str(size),
        "HOROVOD_LOCAL_RANK": str(rank),
        "HOROVOD_LOCAL_SIZE": str(size),
    }


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.shutdown()
    store.server_close()


@pytest.fixture
def listening() -> Iterator[Endpoint]:
    """Where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Endpoint("node", *server.getsockname(), "token")


def gone() -> Endpoint:
    """Where nobody listens any more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Endpoint("node", *server.getsockname(), "token")


def test_all_ranks_meet(store: Store, listening: Endpoint) -> None:
    ends = [listening._replace(token=str(rank)) for rank in range(3)]
    members = [Member(each, each, each) for each in ends]

    def take_part(rank: int) -> list[Member]:
        rendezvous = store.rendezvous(rank, 3)
        rendezvous.announce(members[rank].watch, trains=False)
        assert not rendezvous.others_train()
        return rendezvous.meet(members[rank])

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(take_part, range(3))) == [members] * 3


def test_a_process_finds_others_in_training(store: Store, listening: Endpoint) -> None:
    store.rendezvous(0, 2).announce(listening, trains=True)
    new = store.rendezvous(1, 2)
    new.announce(listening, trains=False)
    assert new.others_train()


def test_a_rank_dies_before_all_have_met(store: Store, listening: Endpoint) -> None:
    """It has announced itself. Whoever has come gives up, whether rank 0 is that one or another."""
    own = Member(listening, listening, listening)
    store.rendezvous(1, 2).announce(gone(), trains=False)
    zero = store.rendezvous(0, 2)
    zero.announce(listening, trains=True)
    with pytest.raises(DeadRankError, match="rank 1 has died before all had met"):
        zero.meet(own)
    store.rendezvous(0, 2).announce(gone(), trains=True)
    one = store.rendezvous(1, 2)
    one.announce(listening, trains=True)
    with pytest.raises(DeadRankError, match="rank 0 has died before all had met"):
        one.meet(own)


def test_a_process_that_never_says_a_word(store: Store, listening: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that train do without it, long before comm.timeout."""
    monkeypatch.setattr(elastic_rendezvous, "STARTUP_TIMEOUT", 0.2)
    zero = store.rendezvous(0, 2)
    zero.announce(listening, trains=True)
    with pytest.raises(DeadRankError, match=r"waited 0\.2 s"):
        zero.meet(Member(listening, listening, listening))


def test_places_in_the_next_group(store: Store) -> None:
    rendezvous = store.rendezvous(3, 4)
    store.values["/rank_and_size/node:3"] = b"2,3,0,1,2,3"
    rendezvous.regroup()
    assert (rendezvous.rank, rendezvous.size) == (2, 3)
    store.values["/rank_and_size/node:3"] = b"-1,-1,-1,-1,-1,-1"
    with pytest.raises(LeftOutError, match="horovodrun has no place for it any more, since another rank of node"):
        rendezvous.regroup()


def test_horovodrun_is_gone() -> None:
    rendezvous = ElasticRendezvous(environment(gone().port, 0, 2), DEADLINE)
    with pytest.raises(LostRankError, match=r"rank 0 on .* does not reach horovodrun at 127\.0\.0\.1"):
        rendezvous.regroup()


def test_which_horovodrun_is_elastic() -> None:
    elastic = environment(1, 0, 2)
    assert starts_elastically(elastic)
    assert not starts_elastically({name: value for name, value in elastic.items() if name != "HOROVOD_ELASTIC"})
