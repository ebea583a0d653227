"""Codec `auto` on links whose rate is known, and changes: it compresses where that pays, and nowhere else."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import command, losses
from launcher import start

# Gradients of some MiB, which travel for half a second at 100 Mbit/s and next to no time at 10 Gbit/s
SETTINGS = {
    "model__layers": 2,
    "model__width": 256,
    "model__context_length": 64,
    "train__batch_size": 8,
    "train__micro_batch_size": 8,
    "train__evaluate_sequences": 8,
    "comm__bucket_mb": 1.0,
    "compression__codec": "auto",
    "compression__candidates": "none,fp16,topk",
}
MPIRUN = ["mpirun", "-np", "2", "-x", "PATH", "-x", "OMP_NUM_THREADS", "--bind-to", "none"]


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster(2, 1, "--rate", "10gbit")


def compressed(choice: str) -> int:
    """How many buckets travel by topk; more than there are if it is all of them."""
    found = re.search(r"topk(?: for (\d+))?", choice)
    return int(found[1] or 10**6) if found else 0


def test_it_compresses_on_a_slow_link_and_keeps_to_it(cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*MPIRUN, "--hostfile", str(cluster.hostfile)]
    for host in cluster.hosts:
        assert cluster.command("link", host, "100mbit").status == 0
    result = cluster.run("h1", [*words, *command(small_data, run_dir, train__steps=30, **SETTINGS)])
    assert result.status == 0, result.output
    chosen = json.loads((run_dir / "checkpoints" / "step_00000030" / "state.json").read_text())["gradients"]["auto"]
    assert set(chosen["names"]) <= {"fp16", "topk", "none"}
    assert "topk" in chosen["names"]
    forecast = re.search(r"codec auto: .*should be there after: (.*)", result.output)
    outcome = re.search(r"codec auto: gradients were there after: (.*); so (.*)", result.output)
    assert forecast and outcome and "topk" in forecast[1] and "topk" in outcome[2]

    again = cluster.run(
        "h1", [*words, *command(small_data, run_dir, "--resume", "latest", train__steps=31, **SETTINGS)]
    )
    assert again.status == 0, again.output
    assert "should be there" not in again.output  # it has not measured
    resumed = json.loads((run_dir / "checkpoints" / "step_00000031" / "state.json").read_text())["gradients"]["auto"]
    assert resumed == chosen


def test_it_chooses_again_when_a_link_changes(cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    for host in cluster.hosts:
        assert cluster.command("link", host, "10gbit").status == 0
    run_dir = tmp_path / "run"
    words = [*MPIRUN, "--hostfile", str(cluster.hostfile)]
    words += command(small_data, run_dir, train__steps=100000, log__every=1, **SETTINGS)
    log = tmp_path / "log"
    log.touch()
    with start(cluster.inside("h1", ["bash", "-c", 'exec "$@" >"$0" 2>&1', str(log), *words])):

        def told(pattern: str, beyond: int = 0) -> re.Match[str]:
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline:
                if found := re.compile(pattern).search(log.read_text(), beyond):
                    return found
                time.sleep(0.2)
            raise AssertionError(f"no {pattern!r} in\n{log.read_text()}")

        first = told(r"codec auto: gradients were there after: .*; so (.*)")
        for host in cluster.hosts:
            assert cluster.command("link", host, "100mbit").status == 0
        parted = told("measuring anew", first.end())
        again = told(r"codec auto: gradients were there after: .*; so (.*)", parted.end())
        assert compressed(again.group(1)) > compressed(first.group(1))
    cluster.end_jobs()
    assert len(losses(run_dir)) > 10
