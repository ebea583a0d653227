"""Local steps against servers: what servers do is replayed by a model of its own; workers die in midst of a round."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import losses, records
from safetensors.torch import load_file
from served import DEADLINE, SHARES, Served
from test_asynchronous import STEPS, WORKERS, log_of, train
from torch import Tensor

EVERY, LR, MOMENTUM = 4, 0.7, 0.5
ROUNDS = 8  # of which the last one has two batches
LOCAL = {"local_steps__every": EVERY, "local_steps__lr": LR, "local_steps__momentum": MOMENTUM}


class Replay:
    """Delayed Nesterov in NumPy, on flat tensors, told what a server was told; it knows nothing of hvdlm."""

    def __init__(self) -> None:
        self.parameters: dict[int, Any] = {}
        self.velocities: dict[int, Any] = {}
        self.sums: dict[int, Any] = {}
        self.pulls = self.in_midst = self.added = self.steps = 0

    def load(self, bucket: int, is_state: bool, message: Tensor) -> None:
        assert not is_state
        self.parameters[bucket] = message.view(torch.float32).numpy().copy()
        self.velocities[bucket] = np.zeros_like(self.parameters[bucket])
        self.sums[bucket] = np.zeros_like(self.parameters[bucket])

    def add(self, bucket: int, message: Tensor) -> None:
        """Parameters move at once, by one rounding for each operation."""
        difference = message.view(torch.float32).numpy()
        self.sums[bucket] += difference
        self.parameters[bucket] += difference * np.float32(LR)

    def task(self, kind: str, task: int, worker: int, now: int, then: int) -> None:
        self.added += kind == "ADD"

    def serve(self, worker: int, thousandths: int) -> None:
        assert thousandths == 0

    def step(self, factor: float, rate: float) -> None:
        """When as many shares have come as a round has."""
        assert (factor, rate, self.added) == (1, LR, WORKERS)
        self.steps, self.added = self.steps + 1, 0
        for bucket, velocity in self.velocities.items():
            velocity *= np.float32(MOMENTUM)
            velocity += self.sums[bucket]
            self.parameters[bucket] += velocity * np.float32(LR * MOMENTUM)
            self.sums[bucket][:] = 0

    def pull(self, bucket: int, ahead: float, sent: Tensor) -> None:
        assert np.array_equal(self.parameters[bucket], sent.numpy())
        self.pulls += 1
        self.in_midst += self.added > 0


def test_every_push_and_pull_replayed(small_data: Path, tmp_path: Path) -> None:
    """Bit for bit, on both servers, to the parameters and the momentum of the last checkpoint. A worker dies while it
    pushes what it has learned, and another makes that share.
    """
    result = train("2:2", small_data, tmp_path, **LOCAL)
    assert result.status == 0, result.output
    orders = [[record[1:] for record in log_of(tmp_path, server) if record[0] == "task"] for server in range(2)]
    assert orders[0] == orders[1]
    assert Counter(task for kind, task, *_ in orders[0] if kind == "ADD") == Counter(range(ROUNDS * WORKERS))
    assert any(kind == "DROP" and worker == 2 for kind, _, worker, *_ in orders[0])
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert [line["rounds"] for line in lines] == list(range(1, ROUNDS + 1))
    assert all(0 <= float(str(line["staleness"])) <= 4 for line in lines)
    assert [record["step"] for record in records(tmp_path / "run", "eval")] == [16, 30]
    parameters, velocities = list[Tensor](), list[Tensor]()
    for server in range(2):
        replay = Replay()
        for what, *told in log_of(tmp_path, server):
            getattr(replay, what)(*told)
        assert replay.steps == ROUNDS
        assert replay.in_midst > 0 and replay.pulls > ROUNDS * WORKERS * len(replay.parameters)
        parameters += map(torch.from_numpy, replay.parameters.values())
        velocities += map(torch.from_numpy, replay.velocities.values())
    saved = tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}"
    for name, numbers in (("model", parameters), ("optimizer", velocities)):
        # All of them, of which parts are filled up with zeros
        found, expected = (
            torch.cat(numbers),
            torch.cat([e.flatten() for e in load_file(saved / f"{name}.safetensors").values()]),
        )
        found, expected = (each[each != 0].sort().values for each in (found, expected))
        assert found.equal(expected)


def test_a_server_without_workers_completes_the_round(small_data: Path, tmp_path: Path) -> None:
    """Of a worker that has died in it; then it goes on with another worker."""
    settings = {**LOCAL, "train__steps": STEPS, "optimizer__lr": 0.001, "comm__bucket_mb": 0.02, "comm__timeout": 60}
    with Served(tmp_path, small_data, **settings) as served, served.worker("0:4") as worker:
        assert worker.finish(DEADLINE).status == -signal.SIGKILL
        served.wait_for_events("has gone, and a share of batch 4 is handed out again: 0 workers")
        served.job.process.send_signal(signal.SIGTERM)
        assert served.job.finish(DEADLINE).status == 75
    assert list(losses(served.run)) == [4, 8]
    with Served(tmp_path, small_data, "--resume", "latest", **settings) as served:
        with served.worker() as worker:
            assert worker.finish(DEADLINE).status == 0
        result = served.job.finish(DEADLINE)
    assert result.status == 0, result.output
    assert list(losses(served.run)) == [4, 8, 12, 16, 20, 24, 28, 30]
    assert Counter(served.tasks("ADD")) == Counter(set(range(ROUNDS * SHARES)) - {4, 5})  # which the server has made
    found = losses(served.run)
    assert found[30] < found[8] < found[4]
