"""Asynchronous training: what servers do is replayed by a model of its own; workers die, and no sample is lost."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import assert_same_curve, command, losses, records
from jobs import train as train_job
from launcher import Result, run
from safetensors.torch import load_file
from torch import Tensor

LOGGED = Path(__file__).with_name("logged_servers.py")
MPIRUN = ["mpirun", "--with-ft", "ulfm", "--oversubscribe", "--bind-to", "none", "-np"]
STEPS, WORKERS = 30, 3
SETTINGS = {
    "train__steps": STEPS,
    "train__evaluate_every": 15,
    "server__ranks": 2,
    "server__max_staleness": 4,
    "comm__bucket_mb": 0.02,
    "comm__timeout": 60,
    "checkpoint__every": 10,
    "optimizer__lr": 0.002,
    "optimizer__weight_decay": 0.0,
}


def train(deaths: str, data: Path, directory: Path, *options: str, **overrides: object) -> Result:
    """Three workers and two servers, within 120 s."""
    directory.mkdir(exist_ok=True)
    (directory / "log").mkdir(exist_ok=True)
    words = command(data, directory / "run", *options, **{**SETTINGS, **overrides})[1:]
    return run([*MPIRUN, "5", sys.executable, str(LOGGED), str(directory / "log"), deaths, *words], deadline=120)


def log_of(directory: Path, server: int) -> Iterator[tuple[Any, ...]]:
    with (directory / "log" / str(WORKERS + server)).open("rb") as file:
        while file.peek(1):
            yield pickle.load(file)


def assert_each_share_counts_once(directory: Path, most: int = 4) -> None:
    """On both servers, in the same order; and none that is older than allowed."""
    orders = [[record[1:] for record in log_of(directory, server) if record[0] == "task"] for server in range(2)]
    assert orders[0] == orders[1]
    counted = Counter(task for kind, task, *_ in orders[0] if kind == "ADD")
    assert counted == Counter(range(STEPS * WORKERS))
    assert all(
        0 <= now - then <= SETTINGS["server__max_staleness"] for kind, *_, now, then in orders[0] if kind == "ADD"
    )


class Replay:
    """AdamW of NumPy on flat tensors, told what a server was told; it knows nothing of hvdlm."""

    def __init__(self) -> None:
        self.parameters: dict[int, Tensor] = {}
        self.before: dict[int, Tensor] = {}  # parameters, the last step
        self.sums: dict[int, Tensor] = {}
        self.late: dict[int, float] = {}  # by worker
        self.moments: dict[int, tuple[Any, Any]] = {}
        self.pulls = self.predicted = self.steps = 0

    def load(self, bucket: int, is_state: bool, message: Tensor) -> None:
        assert not is_state
        self.parameters[bucket] = message.view(torch.float32).clone()
        self.sums[bucket] = torch.zeros_like(self.parameters[bucket])

    def add(self, bucket: int, message: Tensor) -> None:
        self.sums[bucket].add_(message.view(torch.float32))

    def task(self, kind: str, task: int, worker: int, now: int, then: int) -> None:
        if kind == "ADD":
            self.late[worker] = 0.8 * self.late.get(worker, 0.0) + 0.2 * (now - then)

    def serve(self, worker: int, thousandths: int) -> None:
        """At a boundary nothing is predicted, for all meet there; and in the warm-up nobody is late."""
        assert thousandths in (0, round(1000 * self.late.get(worker, 0.0)))

    def step(self, factor: float, rate: float) -> None:
        """Kingma & Ba, with one rounding for each operation, as hvdlm's loops have."""
        self.steps += 1
        f, root = np.float32, np.float32((1 - 0.95**self.steps) ** 0.5)
        for bucket, parameters in self.parameters.items():
            self.before[bucket] = parameters.clone()
            own, gradient = parameters.numpy(), self.sums[bucket].numpy() * f(factor)
            first, second = self.moments.setdefault(bucket, (np.zeros_like(own), np.zeros_like(own)))
            first += (gradient - first) * f(1 - 0.9)
            second[:] = second * f(0.95) + gradient * gradient * f(1 - 0.95)
            own -= first * f(rate / (1 - 0.9**self.steps)) / (np.sqrt(second) / root + f(1e-8))
            self.sums[bucket] = torch.zeros_like(parameters)

    def pull(self, bucket: int, ahead: float, sent: Tensor) -> None:
        now = self.parameters[bucket].numpy()
        if ahead:
            now = now + (now - self.before[bucket].numpy()) * np.float32(ahead)
        assert np.array_equal(now, sent.numpy())
        self.pulls += 1
        self.predicted += ahead > 0


@pytest.fixture(scope="module")
def undisturbed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    result = train("-", small_data, directory, server__predict="true", server__warmup_steps=5)
    assert result.status == 0, result.output
    return directory


def test_every_push_and_pull_replayed(undisturbed: Path) -> None:
    """Bit for bit, on both servers, to the parameters of the last checkpoint."""
    model = load_file(undisturbed / "run" / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors")
    numbers: list[Tensor] = []
    for server in range(2):
        replay, steps = Replay(), 0
        for what, *told in log_of(undisturbed, server):
            getattr(replay, what)(*told)
            steps += what == "step"
        assert steps == STEPS
        assert replay.predicted > STEPS
        assert replay.pulls > STEPS * WORKERS * len(replay.parameters) > STEPS * WORKERS
        numbers += replay.parameters.values()
    # All numbers of the model, of which parts are filled up with zeros
    found, expected = (torch.cat([each.flatten() for each in some]) for some in (numbers, model.values()))
    found, expected = (each[each != 0].sort().values for each in (found, expected))
    assert found.equal(expected)


def test_one_worker_is_never_late(small_data: Path, tmp_path: Path) -> None:
    """50 steps of one worker and a server have the curve of training alone, clipped by the same norms, by however many
    shares of a batch.
    """
    alone = tmp_path / "alone"
    settings = {"optimizer__lr": 0.001, "comm__bucket_mb": 0.02}
    assert train_job("none", 1, small_data, alone, **settings).status == 0
    for shares in (0, 3):
        served, of_servers = tmp_path / f"{shares} shares", {"server__ranks": 1, "server__max_staleness": 4}
        result = train_job("mpirun", 2, small_data, served, server__shares=shares, **of_servers, **settings)
        assert result.status == 0, result.output
        assert_same_curve(losses(served), losses(alone), relative=1e-6)
        assert {record["staleness"] for record in records(served)} == {0.0}


def test_each_share_counts_once(undisturbed: Path) -> None:
    assert_each_share_counts_once(undisturbed)
    assert list(losses(undisturbed / "run")) == list(range(1, STEPS + 1))
    ages = [float(str(record["staleness"])) for record in records(undisturbed / "run")]
    assert 0 <= min(ages) <= max(ages) <= 4 and max(ages) > 0
    assert [record["step"] for record in records(undisturbed / "run", "eval")] == [15, 30]


def test_shares_that_come_too_late(small_data: Path, tmp_path: Path) -> None:
    """Of a worker that rests in every push: its gradients do not count, and others make them again, once."""
    result = train("2:rests", small_data, tmp_path, server__max_staleness=1)
    assert result.status == 0, result.output
    assert_each_share_counts_once(tmp_path, most=1)
    dropped = sum(record[:2] == ("task", "DROP") for record in log_of(tmp_path, 0))
    assert records(tmp_path / "run")[-1]["dropped"] == dropped > 0


def test_workers_that_die_with_a_task_in_hand(small_data: Path, tmp_path: Path, undisturbed: Path) -> None:
    """The first worker, which logs and saves, in the midst of a push; then another: the last one makes all the rest."""
    result = train("0:7,2:14", small_data, tmp_path)
    assert result.status == 0, result.output
    assert_each_share_counts_once(tmp_path)
    said = [str(each["message"]) for each in records(tmp_path / "run", "event") if "died" in str(each["message"])]
    assert sum(int(each.split()[0]) for each in said) == 2, said
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 1))
    own, expected = (float(str(records(each / "run", "eval")[-1]["loss"])) for each in (tmp_path, undisturbed))
    assert abs(own / expected - 1) < 0.05


def test_resumed_after_a_boundary(small_data: Path, tmp_path: Path) -> None:
    """On synchronous servers: what is saved is of whole batches."""
    assert train("-", small_data, tmp_path, train__steps=20, optimizer__schedule="wsd").status == 0
    settings = {"server__max_staleness": 0, "optimizer__schedule": "wsd"}
    result = train("-", small_data, tmp_path, "--resume", "latest", **settings)
    assert result.status == 0, result.output
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 1))
    assert "step_00000020, step 20" in result.output
