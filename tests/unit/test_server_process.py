"""A server that is a process of its own: who is let in, what workers may send, its token, and its settings."""

from __future__ import annotations

import itertools
import json
import queue
import socket
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_config import configure, refusal

from hvdlm.comm.admission import Admission, join, number_in
from hvdlm.comm.failure import LostRankError
from hvdlm.comm.mailbox import Letter, Mailbox, letter_of
from hvdlm.comm.server_mailbox import SERVER, ServerMailbox
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.comm.worker_mailbox import LeavingError, ServerGoneError, WorkerMailbox
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.server.group import NONE, Kind, ServerGroup
from hvdlm.strategies.server.independent import IndependentServer
from hvdlm.strategies.server.independent_follower import IndependentFollower
from hvdlm.strategies.server.owned import OwnedParameters
from hvdlm.strategies.server.rounds import ServedRounds
from hvdlm.strategies.server.served_model import ServedModel
from hvdlm.training.server_token import VARIABLE, make_token, token_of_worker
from hvdlm.training.serving import step_plan
from hvdlm.training.worker_agreement import description, difference

DEADLINE = 20.0
TOKEN = "ab" * 32
SETTINGS = ("--server.listen", "127.0.0.1:0", "--server.max_staleness", "2")
TINY = (
    *("--model.layers", "1", "--model.width", "16", "--model.heads", "1"),
    *("--train.steps", "9", "--optimizer.warmup_steps", "0"),
)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---- who is let in


@pytest.fixture
def mailbox() -> Iterator[ServerMailbox]:
    """Of a server that takes whoever says that it is a friend."""
    made, numbers = ServerMailbox("127.0.0.1", 0, DEADLINE), itertools.count()
    made.open(TOKEN, lambda said: Admission(next(numbers), 3) if said.get("is_friend") else "it is none")
    yield made
    made.close()


def connect(mailbox: ServerMailbox, is_stopped: Callable[[], bool] = lambda: False) -> WorkerMailbox:
    connection, admission = join("127.0.0.1", mailbox.port, TOKEN, {"is_friend": True}, DEADLINE)
    return WorkerMailbox([connection], admission.number, "server", DEADLINE, is_stopped)


def test_workers_are_numbered(mailbox: ServerMailbox) -> None:
    """No number is given twice, and one that has left counts as dead, after all that it has sent."""
    one, two = connect(mailbox), connect(mailbox)
    assert (one.rank, two.rank) == (0, 1)
    one.post([SERVER], (7, 1, 2, 3), torch.arange(3))
    one.close()
    until(lambda: 0 in mailbox.dead())
    letter = mailbox.take()
    assert letter is not None and (letter.source, letter.header) == (0, (7, 1, 2, 3))
    assert letter.data.view(torch.int64).tolist() == [0, 1, 2]
    three = connect(mailbox)
    assert three.rank == 2
    mailbox.post([0, 2], (8,))
    assert three.receive("a letter").header == (8, 0, 0, 0)
    assert mailbox.dead() == {0}
    assert mailbox.name_of(2) == "worker 2 at 127.0.0.1"


def test_workers_are_told_of_the_end(mailbox: ServerMailbox) -> None:
    one, two = connect(mailbox), connect(mailbox)
    ending = threading.Thread(target=mailbox.end, args=((9, 75),))
    ending.start()
    for each in (one, two):
        assert each.receive("the end").header == (9, 75, 0, 0)
        each.close()
    ending.join(DEADLINE)
    assert not ending.is_alive()
    with pytest.raises(ServerGoneError, match="the server at server has gone: it has closed the connection; start it"):
        one.receive("more")


def test_a_worker_that_is_asked_to_stop_does_not_wait(mailbox: ServerMailbox) -> None:
    stops: list[bool] = []
    one = connect(mailbox, lambda: bool(stops))
    mailbox.post([0], (5,))
    stops.append(True)
    until(lambda: one._arrived.qsize() > 0)
    assert one.receive("what is there").kind == 5
    with pytest.raises(LeavingError):
        one.receive("what is not")


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n".ljust(100),
        TOKEN[::-1].encode() + bytes(4) + b"\2\0\0\0{}",
        TOKEN.encode() + bytes(4) + b"\xff\xff\xff\xff" + bytes(100),
        TOKEN.encode() + bytes(4) + b"\x02\0\0\0[]",
        TOKEN.encode() + bytes(4) + b"\x05\0\0\0\x80\x04K\x07.",  # a pickle
        TOKEN.encode() + bytes(4) + (100_000).to_bytes(4, "little") + b"[" * 100_000,
    ],
)
def test_strangers_get_no_answer(greeting: bytes, mailbox: ServerMailbox) -> None:
    with socket.create_connection(("127.0.0.1", mailbox.port), timeout=DEADLINE) as stranger:
        stranger.sendall(greeting)
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    assert connect(mailbox).rank == 0


def test_who_is_not_wanted(mailbox: ServerMailbox) -> None:
    with pytest.raises(HvdlmError, match=r"127.0.0.1:\d+ does not take this worker: it is none$"):
        join("127.0.0.1", mailbox.port, TOKEN, {}, DEADLINE)
    with pytest.raises(HvdlmError, match="has closed the connection: give the token"):
        join("127.0.0.1", mailbox.port, "cd" * 32, {"is_friend": True}, DEADLINE)
    assert connect(mailbox).rank == 0


def test_more_strangers_than_are_looked_at(mailbox: ServerMailbox) -> None:
    """Those that say nothing are turned away after a moment, and workers come in."""
    silent = [socket.create_connection(("127.0.0.1", mailbox.port), timeout=DEADLINE) for _ in range(40)]
    assert connect(mailbox).rank == 0
    for each in silent:
        each.close()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x02\0\0\0{}", b'\x0e\0\0\0{"number": []}'])
def test_somebody_else_listens(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_once() -> None:
            connection, _ = listener.accept()
            connection.sendall(answer.ljust(100))
            connection.recv(2**16)
            connection.close()

        threading.Thread(target=answer_once, daemon=True).start()
        with pytest.raises(HvdlmError, match=r"does not answer as hvdlm serve would|has closed the connection"):
            join("127.0.0.1", listener.getsockname()[1], TOKEN, {}, DEADLINE)


def test_an_address_that_cannot_be_listened_at(mailbox: ServerMailbox) -> None:
    with pytest.raises(HvdlmError, match=rf"server.listen = 127.0.0.1:{mailbox.port}: Address already in use; give"):
        ServerMailbox("127.0.0.1", mailbox.port, DEADLINE)
    with pytest.raises(HvdlmError, match=r"cannot listen at server.listen = no-such-host.invalid:7: "):
        ServerMailbox("no-such-host.invalid", 7, DEADLINE)


# ---- what workers may send


class FakeRun:
    """Notes what a server tells the process."""

    def __init__(self) -> None:
        self.told: queue.Queue[str] = queue.Queue()
        self.steps: list[dict[str, float]] = []
        self.boundaries: list[tuple[int, bool]] = []
        self.trained: list[int] = []

    def train_on(self, task: int, first: int) -> tuple[float, int]:
        assert first == task // 2  # the batch of a share
        self.trained.append(task)
        return 1.0, 1

    def before_update(self) -> None:
        pass

    def after_step(self, line: dict[str, float]) -> None:
        self.steps.append(line)

    def at_boundary(self, step: int, is_end: bool) -> None:
        self.boundaries.append((step, is_end))

    def tell(self, sentence: str) -> None:
        self.told.put(sentence)

    def wait_for(self, part: str) -> str:
        while part not in (said := self.told.get(timeout=DEADLINE)):
            pass
        return said


class Serving:
    """An IndependentServer in a thread, of a tiny model, that hands out two shares of each batch."""

    def __init__(self, mailbox: ServerMailbox, patience: float = DEADLINE) -> None:
        self.config = configure(*SETTINGS, *TINY, "--server.shares", "2")
        group, alone = ServerGroup(mailbox, SERVER, 1, SoloCommunicator()), SoloCommunicator()
        model = ServedModel(Transformer(self.config.model, 31), alone, group, self.config)
        self.run, self.stops, plan = FakeRun(), False, step_plan(self.config, 2)
        self.server = IndependentServer(
            model.owned, group, alone.activity, self.config.server, plan, lambda: self.stops, self.run, patience
        )
        self.sizes = [model.owned.weights(bucket).numel() for bucket in range(model.owned.buckets)]
        self.finished: list[bool] = []
        self.thread = threading.Thread(target=lambda: self.finished.append(self.server.serve(0)), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.stops = True
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()

    def task(self, worker: WorkerMailbox) -> tuple[int, int]:
        """The next one of a worker, and its version."""
        while (letter := worker.receive("a task")).kind != Kind.TASK:
            assert letter.kind == Kind.WEIGHTS
        return letter.header[1:3]

    def push(self, worker: WorkerMailbox, task: int, version: int, leaves: int = 0) -> None:
        for bucket, size in enumerate(self.sizes):
            worker.post([SERVER], (Kind.PUSH, bucket, task), torch.zeros(size))
        worker.post([SERVER], (Kind.DONE, task, version, leaves), torch.tensor([2.0, 1.0], dtype=torch.float64))


@pytest.fixture
def serving(mailbox: ServerMailbox) -> Iterator[Serving]:
    made = Serving(mailbox)
    yield made
    made.stop()


def test_a_stop_without_workers_in_the_midst_of_a_batch(serving: Serving, mailbox: ServerMailbox) -> None:
    """One worker does a batch and a half, and leaves: the process does the other half, and ends at a boundary."""
    assert serving.run.wait_for("no worker")
    worker = connect(mailbox)
    worker.post([SERVER], (Kind.DONE, NONE, NONE, 0))
    for expected, leaves in ((0, 0), (1, 0), (2, 1)):
        task, version = serving.task(worker)
        assert (task, version) == (expected, expected // 2)
        serving.push(worker, task, version, leaves)
    assert serving.run.wait_for("leaves") == "worker 0 at 127.0.0.1 leaves: 0 workers"
    serving.stop()
    assert serving.run.trained == [3]
    assert serving.run.boundaries == [(2, True)]
    assert [(line["step"], line["loss"], line["tokens"]) for line in serving.run.steps] == [
        (1, 4.0, 2.0),
        (2, 3.0, 2.0),
    ]
    assert serving.finished == [False]


@pytest.mark.parametrize(
    ("letters", "is_while_holding"),
    [
        ([((Kind.END, 0), 0)], True),
        ([((Kind.LOAD, 0, 0), 8)], True),
        ([((Kind.STEP, 0), 8)], True),
        ([((Kind.ADD, 0, 0, 0), 0)], True),
        ([((12345,), 0)], True),
        ([((Kind.PUSH, 99, 0), 8)], True),
        ([((Kind.PUSH, -1, 0), 8)], True),
        ([((Kind.PUSH, 0, 5), 8)], True),  # of a task that another may hold
        ([((Kind.PUSH, 0, 0), 8)], False),
        ([((Kind.DONE, 0, 0, 0), 16)], True),  # nothing was pushed
        ([((Kind.DONE, NONE, NONE, 0), 0)], True),  # it holds one
    ],
)
def test_what_no_worker_sends(
    letters: Sequence[tuple[Sequence[int], int]], is_while_holding: bool, serving: Serving, mailbox: ServerMailbox
) -> None:
    """Its sender is disconnected, and what it held handed out again; the server lives."""
    bad = connect(mailbox)
    if is_while_holding:
        bad.post([SERVER], (Kind.DONE, NONE, NONE, 0))
        assert serving.task(bad) == (0, 0)
    for header, length in letters:
        bad.post([SERVER], header, torch.zeros(length, dtype=torch.uint8))
    with pytest.raises(ServerGoneError):
        while True:
            bad.receive("anything")
    if is_while_holding:
        assert "is disconnected, for it has sent what no worker sends" in serving.run.wait_for("is disconnected")
    good = connect(mailbox)
    good.post([SERVER], (Kind.DONE, NONE, NONE, 0))
    task, version = serving.task(good)
    assert task == 0
    serving.push(good, task, version)
    assert serving.task(good) == (1, 0)
    good.close()
    serving.run.wait_for("has gone, and a share of batch 0 is handed out again")


def test_a_worker_that_takes_too_long(mailbox: ServerMailbox) -> None:
    serving = Serving(mailbox, patience=0.2)
    slow = connect(mailbox)
    slow.post([SERVER], (Kind.DONE, NONE, NONE, 0))
    assert serving.task(slow) == (0, 0)
    said = serving.run.wait_for("is disconnected")
    assert said.endswith(
        "for it takes longer than 0.2 s (comm.timeout) for a share, and a share of batch 0 is handed out "
        "again: 0 workers"
    )
    serving.stop()
    assert serving.run.trained == [0, 1]


# ---- a server that is not the first one


class FirstServer(Mailbox):
    """Letters between it and another server in this process."""

    def __init__(self) -> None:
        super().__init__(DEADLINE)
        self.rank, self.size = 1, 2
        self.are_dead: set[int] = set()
        self.sent: queue.Queue[Letter] = queue.Queue()
        self._coming: queue.Queue[Letter] = queue.Queue()

    def order(self, *header: int) -> None:
        numbers = torch.tensor([*header, *[0] * (4 - len(header))])
        self._coming.put(letter_of(numbers.view(torch.uint8), 0))

    def _post(self, message: torch.Tensor, destinations: Sequence[int]) -> None:
        assert list(destinations) in ([], [0])
        for _ in destinations:
            self.sent.put(letter_of(message, 1))

    def take(self) -> Letter | None:
        with suppress(queue.Empty):
            return self._coming.get_nowait()
        return None

    def has_sent(self) -> bool:
        return True

    def dead(self) -> Collection[int]:
        return self.are_dead

    def close(self) -> None:
        pass


class Following:
    """An IndependentFollower in a thread, the second of two servers."""

    def __init__(self) -> None:
        config, alone, self.first = configure(*SETTINGS, *TINY), SoloCommunicator(), FirstServer()
        self.mailbox = ServerMailbox("127.0.0.1", 0, DEADLINE, self.first)
        self.mailbox.open(TOKEN, lambda said: None if (number := number_in(said)) is None else Admission(number))
        group = ServerGroup(self.mailbox, SERVER, 2, alone)
        self.owned = OwnedParameters(Transformer(config.model, 31), config, group)
        self.run, self.stops, rounds = FakeRun(), False, ServedRounds.of_run(config)
        server = IndependentFollower(
            self.owned, group, alone.activity, config.server, rounds, lambda: self.stops, self.run
        )
        self.sizes = [self.owned.weights(bucket).numel() for bucket in range(self.owned.buckets)]
        self.thread = threading.Thread(target=server.serve, args=(0,), daemon=True)
        self.thread.start()

    def worker(self, number: int) -> WorkerMailbox:
        """One that this server alone knows."""
        connection, _ = join("127.0.0.1", self.mailbox.port, TOKEN, {"number": number}, DEADLINE)
        return WorkerMailbox([connection], number, "server", DEADLINE, lambda: False)

    def push(self, worker: WorkerMailbox, task: int, value: float) -> None:
        for bucket, size in enumerate(self.sizes):
            worker.post([SERVER], (Kind.PUSH, bucket, task), torch.full((size,), value))

    def has_all_of(self, task: int, worker: int) -> None:
        assert self.first.sent.get(timeout=DEADLINE).header[:3] == (Kind.HAVE, task, worker)

    def norm(self) -> float:
        self.first.order(Kind.SUM)
        letter = self.first.sent.get(timeout=DEADLINE)
        assert letter.kind == Kind.NORM
        return float(letter.data.view(torch.float64))


@pytest.fixture
def following() -> Iterator[Following]:
    made = Following()
    yield made
    made.first.order(Kind.BOUNDARY, 9, 1)
    made.thread.join(DEADLINE)
    assert not made.thread.is_alive() and made.run.boundaries[-1] == (9, True)
    made.mailbox.close()


def test_what_a_worker_has_sent_that_has_left(following: Following) -> None:
    """It does not count, and neither does what comes later; a share of another worker counts once it is ordered."""
    left, other = following.worker(0), following.worker(5)
    following.push(left, 3, 1.0)
    following.has_all_of(3, 0)
    following.first.order(Kind.LEFT, 0)
    with pytest.raises(ServerGoneError):
        left.receive("anything")
    following.push(other, 3, 2.0)
    following.has_all_of(3, 5)
    assert following.norm() == 0
    following.first.order(Kind.ADD, 3, 5, 0)
    assert following.norm() == pytest.approx(2 * sum(following.sizes) ** 0.5)


@pytest.mark.parametrize("header", [(Kind.PUSH, 99, 0), (Kind.PUSH, -1, 0), (Kind.STEP, 0), (Kind.LEFT, 5), (999,)])
def test_what_no_worker_sends_another_server(header: Sequence[int], following: Following) -> None:
    """Its sender is disconnected; the server lives."""
    bad, good = following.worker(1), following.worker(5)
    bad.post([SERVER], header, torch.zeros(8))
    with pytest.raises(ServerGoneError):
        bad.receive("anything")
    following.push(good, 0, 1.0)
    following.has_all_of(0, 5)


def test_two_tasks_at_once(following: Following) -> None:
    """Nobody holds two: the server keeps nothing of either."""
    bad = following.worker(1)
    following.push(bad, 0, 1.0)
    following.has_all_of(0, 1)
    following.push(bad, 1, 1.0)
    with pytest.raises(ServerGoneError):
        bad.receive("anything")
    assert following.norm() == 0


def test_a_bucket_that_comes_twice(following: Following) -> None:
    """The first server is told once that all is here."""
    bad = following.worker(1)
    following.push(bad, 0, 1.0)
    following.has_all_of(0, 1)
    bad.post([SERVER], (Kind.PUSH, 0, 0), torch.zeros(8))
    with pytest.raises(ServerGoneError):
        bad.receive("anything")
    assert following.norm() == 0


def test_another_server_that_has_died() -> None:
    """By a mailbox that knows."""
    others = FirstServer()
    mailbox = ServerMailbox("127.0.0.1", 0, DEADLINE, others)
    assert mailbox.take() is None
    others.are_dead = {0}
    with pytest.raises(LostRankError, match="server 0 has died: start all again"):
        mailbox.take()
    mailbox.close()


def test_a_share_without_sequences() -> None:
    """Has no gradients, or not of all parameters: what there is counts."""
    config, alone = configure(*SETTINGS, *TINY), SoloCommunicator()
    mailbox = ServerMailbox("127.0.0.1", 0, DEADLINE)
    owned = OwnedParameters(Transformer(config.model, 31), config, ServerGroup(mailbox, SERVER, 1, alone))
    owned.add_own({})
    assert owned.norm() == 0
    owned.add_own({"final_norm.weight": torch.full((16,), 2.0)})
    assert owned.norm() == pytest.approx(8)
    mailbox.close()


def test_numbers_that_another_worker_has(following: Following) -> None:
    following.worker(3)
    for said in ({"number": 3}, {"number": -1}, {"number": SERVER}, {"number": "4"}, {"number": True}, {}):
        with pytest.raises(HvdlmError, match="has closed the connection"):
            join("127.0.0.1", following.mailbox.port, TOKEN, said, DEADLINE)


def test_a_signal_to_another_server(following: Following) -> None:
    """It asks the first one, once, which then ends both."""
    following.stops = True
    assert following.first.sent.get(timeout=DEADLINE).header == (Kind.DONE, NONE, NONE, 1)
    following.first.order(Kind.BOUNDARY, 4, 0)
    until(lambda: following.run.boundaries == [(4, False)])
    assert following.first.sent.empty()


# ---- what workers share with their server


def fake_data(fingerprint: str = "f" * 64) -> Any:
    return SimpleNamespace(fingerprint=fingerprint, vocab_size=256, path="data")


def said(config: Config, data: Any) -> dict[str, Any]:
    """As it has been sent."""
    found: dict[str, Any] = json.loads(json.dumps(description(config, data)))
    return found


def test_a_worker_with_settings_of_its_own() -> None:
    """How it computes, reads and writes, and those of the server alone."""
    server = configure(*SETTINGS, "--train.run_dir", "runs/a", "--checkpoint.every", "5", "--server.shares", "2")
    own = ("--train.threads", "2", "--train.micro_batch_size", "1", "--data.path", "elsewhere", "--comm.timeout", "9")
    worker = configure("--server.address", "host:7", *own, "--log.every", "7")
    assert difference(server, fake_data(), said(worker, fake_data())) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--train.seed", "3"], "it has train.seed = 3, which is 0 on the server; give both one configuration"),
        (
            ["--model.layers", "3", "--optimizer.lr", "1"],
            "model.layers = 3, which is 4 on the server, optimizer.lr = 1",
        ),
        (["--server.pull", "bf16"], "server.pull = bf16, which is fp32 on the server"),
        (["--comm.bucket_mb", "3"], "comm.bucket_mb = 3.0, which is 0.0"),
        (["--compression.codec", "int8"], "compression.codec = int8, which is none"),
    ],
)
def test_a_worker_with_other_settings(words: list[str], sentence: str) -> None:
    server, worker = configure(*SETTINGS), configure("--server.address", "host:7", *words)
    assert sentence in str(difference(server, fake_data(), said(worker, fake_data())))


def test_a_worker_with_other_data_or_software() -> None:
    config = configure(*SETTINGS)
    unlike = str(difference(config, fake_data(), said(config, fake_data("a" * 64))))
    assert unlike.startswith("the data set: it has fingerprint aaaaaaaaaaaa with a vocabulary of 256, and the server f")
    other = said(config, fake_data())
    other["shared"]["torch"] = "0.1"
    assert str(difference(config, fake_data(), other)).startswith("torch: it has 0.1, and the server ")
    for nonsense in ({}, {"shared": 3, "settings": []}, {"shared": {"hvdlm": {}}}):
        assert "hvdlm: it has " in str(difference(config, fake_data(), nonsense))


# ---- the token


def test_the_token_stays_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    token = make_token(tmp_path)
    assert len(token) == 64 and token != make_token(tmp_path / "other")
    file = tmp_path / "token"
    file.chmod(0o644)
    assert make_token(tmp_path) == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("short")
    assert make_token(tmp_path) != token


def test_where_a_worker_has_the_token_from(tmp_path: Path) -> None:
    token, file = make_token(tmp_path), tmp_path / "token"
    by_file = configure("--server.address", "host:7", "--server.token_file", str(file)).server
    by_variable = configure("--server.address", "host:7").server
    assert token_of_worker(by_file, {}) == token
    assert token_of_worker(by_variable, {VARIABLE: f"{token}\n"}) == token
    with pytest.raises(
        HvdlmError, match=r"needs the token of that server: set server.token_file to a copy of the file"
    ):
        token_of_worker(by_variable, {VARIABLE: ""})
    with pytest.raises(HvdlmError, match="HVDLM_SERVER_TOKEN is no token, which has 64 hexadecimal digits"):
        token_of_worker(by_variable, {VARIABLE: "secret"})
    file.write_text("g" * 64)
    with pytest.raises(HvdlmError, match=r"server.token_file = \S+/token is no token"):
        token_of_worker(by_file, {})
    file.unlink()
    with pytest.raises(HvdlmError, match=r"cannot read server.token_file = \S+/token: No such file"):
        token_of_worker(by_file, {})


# ---- settings


def test_settings() -> None:
    server, worker = configure(*SETTINGS).server, configure("--server.address", "[::1]:7000").server
    assert (server.endpoint, server.shares_of_a_process, server.is_asynchronous) == (("127.0.0.1", 0), 4, True)
    assert (worker.endpoint, worker.is_asynchronous) == (("::1", 7000), True)
    assert configure("--server.listen", ":7000", "--server.max_staleness", "1").server.endpoint == ("", 7000)
    assert Admission(3, 4)._asdict() == {"number": 3, "shares": 4, "others": ()}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--server.listen", "host"], "server.listen = 'host': give HOST:PORT, as in host1:7000"),
        (["--server.listen", "host:70000"], "give HOST:PORT"),
        (["--server.listen", "::1:7000"], "give HOST:PORT"),
        (["--server.address", ":7000"], "give a host and a port above 0"),
        (["--server.address", "host:0"], "give a host and a port above 0"),
        (
            ["--server.listen", "host:7"],
            "set server.max_staleness, how many steps late their gradients may be, above 0",
        ),
        (["--server.address", "host:7", "--server.ranks", "1"], "set one of them"),
        ([*SETTINGS, "--server.ranks", "1"], "set one of them"),
        (["--server.shares", "2"], "set server.max_staleness with it"),
        (["--server.address", "host:7", "--train.max_time", "1h"], "with server.address leave them out"),
        ([*SETTINGS, "--optimizer.algorithm", "muon"], "adam, sgd or lion with server.listen"),
        (["--server.address", "host:7", "--compression.codec", "auto"], "with server.address set it to none, fp16"),
        ([*SETTINGS, "--parallel.shard", "1"], "server.listen needs the whole model on every worker"),
        (["--server.address", "host:7", "--train.ema", "0.9"], "it does not go with server.address"),
        ([*SETTINGS, "--comm.elastic", "true"], "server.listen does not go with comm.elastic = true"),
    ],
)
def test_what_does_not_fit(words: list[str], sentence: str) -> None:
    assert sentence in refusal(*words)
