"""The rendezvous of engine torch: which address of rank 0 a rank takes, and which interface Gloo uses."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from torch.distributed import Store, TCPStore

from hvdlm.comm import rendezvous
from hvdlm.comm.liveness import LivenessServer
from hvdlm.comm.rendezvous import LOOPBACK
from hvdlm.comm.rendezvous import rendezvous as join
from hvdlm.errors import HvdlmError

TOKEN = "a-token-of-this-job"


def endpoint(addresses: list[str], liveness_port: int) -> rendezvous._Endpoint:
    return rendezvous._Endpoint(addresses, 1, liveness_port, TOKEN)


def test_the_first_address_that_answers_is_taken() -> None:
    """127.0.0.2 and .3 lead here too, but nobody listens on them at that port."""
    with socket.socket() as only, socket.socket() as closed:
        only.bind(("127.0.0.3", 0))
        only.listen()
        port = only.getsockname()[1]
        closed.bind(("127.0.0.2", port))  # bound, not listening: refuses
        answerer = threading.Thread(target=lambda: only.accept()[0].sendall(TOKEN.encode()), daemon=True)
        answerer.start()
        assert rendezvous._reachable_address(endpoint(["127.0.0.2", "127.0.0.3"], port), rank=1) == "127.0.0.3"
        answerer.join(5)


def test_another_job_that_answers_is_not_taken() -> None:
    """docker0 has one address on all hosts: what listens there may be another job's."""
    with (
        closing(LivenessServer("another-token-as-long", poll_interval=0.05)) as server,
        pytest.raises(HvdlmError, match=r"rank 3 on .* reaches rank 0 at none of its addresses 127.0.0.2: let one"),
    ):
        rendezvous._reachable_address(endpoint([LOOPBACK, "127.0.0.2"], server.port), rank=3)


def test_a_liveness_server_answers_many() -> None:
    with closing(LivenessServer(TOKEN, poll_interval=0.05)) as server:
        assert {rendezvous._reachable_address(endpoint([LOOPBACK], server.port), rank) for rank in range(1, 9)} == {
            LOOPBACK
        }


@pytest.mark.parametrize(
    ("launcher", "environment", "expected"),
    [
        ("none", {}, (LOOPBACK, 0)),
        ("mpirun", {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, ("n1", 29500)),
        ("torchrun", {"MASTER_ADDR": "n2", "MASTER_PORT": "29501"}, ("n2", 29501)),
        ("mpirun", {}, None),
        ("horovodrun", {}, None),
        ("srun", {"PMIX_RANK": "0", "SLURM_STEP_NODELIST": "n1"}, None),  # there MPI works
        # job 77, step 0: 20000 + 77 * 8
        ("srun", {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}, ("n1", 20616)),
    ],
)
def test_what_all_know_beforehand(launcher: str, environment: dict[str, str], expected: tuple[str, int] | None) -> None:
    assert rendezvous._known_endpoint(launcher, environment) == expected


@pytest.mark.parametrize(
    ("name", "value"), [("MASTER_PORT", "http"), ("MASTER_PORT", ""), ("MASTER_PORT", "65536"), ("MASTER_ADDR", "")]
)
def test_what_is_no_host_and_port_is_named(name: str, value: str) -> None:
    environment = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"} | {name: value}
    with pytest.raises(HvdlmError, match=r"MASTER_ADDR=.* and MASTER_PORT=.* are no host and port"):
        rendezvous._known_endpoint("torchrun", environment)


@pytest.mark.parametrize("name", ["SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID"])
def test_slurm_that_does_not_say_where_rank_0_is(name: str) -> None:
    environment = {"SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"} | {name: ""}
    with pytest.raises(HvdlmError, match=f"do not say where rank 0 is .*{name}=[,)].*: start the ranks with srun"):
        rendezvous._known_endpoint("srun", environment)


def test_what_an_earlier_attempt_has_left_in_torchruns_store_is_not_read_again() -> None:
    """torchrun starts all ranks again, or a script runs two commands under it: rank 0 has died before rank 1 wrote."""
    kept = TCPStore(LOOPBACK, 0, 1, is_master=True, wait_for_workers=False)

    def start(rank: int, attempt: str) -> Store:
        return rendezvous._store_of_this_start(kept, rank, {"TORCHELASTIC_RESTART_COUNT": attempt})

    start(0, "0").set("address", "of attempt 0")
    first, second = start(0, "1"), start(1, "1")
    assert not second.check(["address"])
    first.set("address", "of attempt 1")
    assert second.get("address") == b"of attempt 1"
    first, second = start(0, "1"), start(1, "1")  # the next command of a script
    assert not second.check(["address"])
    first.set("address", "of the next command")
    assert second.get("address") == b"of the next command"


def test_each_start_under_torchrun_has_a_store_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = TCPStore(LOOPBACK, 0, 1, is_master=True, wait_for_workers=False)  # torchrun's
    monkeypatch.setenv("MASTER_ADDR", LOOPBACK)
    monkeypatch.setenv("MASTER_PORT", str(kept.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    join("torchrun", 0, 1, timeout=5).set("address", "of the first start")
    assert not join("torchrun", 0, 1, timeout=5).check(["address"])


@pytest.mark.parametrize("value", ["False", None])
def test_rank_0_listens_where_torchrun_does_not(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", LOOPBACK)
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", value)
    store = join("torchrun", 0, 1, timeout=5)
    store.set("a", "b")
    assert store.get("a") == b"b"


class KeyValues(BaseHTTPRequestHandler):
    """What horovodrun serves to its ranks."""

    kept: dict[str, bytes]
    missing = 404  # what is answered where nothing is kept

    def do_PUT(self) -> None:
        self.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200 if self.path in self.kept else self.missing)
        self.end_headers()
        self.wfile.write(self.kept.get(self.path, b""))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def horovodrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The environment of a rank of horovodrun's, and what its key-value store keeps."""
    KeyValues.kept = {}
    with HTTPServer((LOOPBACK, 0), KeyValues) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", LOOPBACK)
        monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(server.server_address[1]))
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is as before after the test
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        yield KeyValues.kept
        server.shutdown()


def join_both() -> list[TCPStore]:
    """Ranks 0 and 1 as threads."""
    stores: dict[int, TCPStore] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: stores.update({rank: join("horovodrun", rank, 2, 10)}))  # type: ignore[misc]
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [stores[0], stores[1]]


def test_an_endpoint_of_a_command_that_has_ended_is_read_again(horovodrun: dict[str, bytes]) -> None:
    """Another command under the same horovodrun has left it, and rank 0 comes later than the others."""
    left = {"addresses": [LOOPBACK], "store_port": 1, "liveness_port": 1, "token": "of a command that has ended"}
    horovodrun["/hvdlm/rank_0"] = json.dumps(left).encode()
    stores = []
    second = threading.Thread(target=lambda: stores.append(join("horovodrun", 1, 2, 30)))
    second.start()
    time.sleep(0.2)
    stores.append(join("horovodrun", 0, 2, 30))
    second.join(30)
    assert len(stores) == 2


def test_two_ranks_of_a_host_connect_on_its_loopback(horovodrun: dict[str, bytes]) -> None:
    first, second = join_both()
    first.set("said", "by rank 0")
    assert second.get("said") == b"by rank 0"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    told = json.loads(horovodrun["/hvdlm/rank_0"])
    assert told["addresses"][0] == LOOPBACK and told["store_port"] == first.port


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_ranks_do_not_ask_a_proxy_for_one_another(
    variable: str, horovodrun: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as closed:
        closed.bind((LOOPBACK, 0))  # bound, not listening: refuses
        monkeypatch.setenv(variable, f"http://{LOOPBACK}:{closed.getsockname()[1]}")
        first, second = join_both()
    first.set("said", "by rank 0")
    assert second.get("said") == b"by rank 0"
    assert list(horovodrun) == ["/hvdlm/rank_0"]


@pytest.mark.usefixtures("horovodrun")
def test_something_else_listens_where_the_store_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyValues, "missing", 403)
    with pytest.raises(
        HvdlmError, match=r"rank 1 asked 127.0.0.1:\d+ .* answers 403 Forbidden: something else listens"
    ):
        join("horovodrun", 1, 2, timeout=10)


@pytest.mark.usefixtures("horovodrun")
def test_the_store_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind((LOOPBACK, 0))
        monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(closed.getsockname()[1]))
        for rank in range(2):
            with pytest.raises(
                HvdlmError, match=rf"rank {rank} on .* does not reach horovodrun's .*Connection refused"
            ):
                join("horovodrun", rank, 2, timeout=10)


def test_the_users_interface_is_kept(horovodrun: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    join_both()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.usefixtures("horovodrun")
def test_a_rank_that_hears_nothing_of_rank_0() -> None:
    with pytest.raises(HvdlmError, match=r"rank 1 received nothing from rank 0 at 127.0.0.1:\d+ within 0.2 s"):
        join("horovodrun", 1, 2, timeout=0.2)
