"""Codec `auto` on links whose rate is known, and changes: it compresses where that pays, and nowhere else."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import command, losses
from launcher import start

pytestmark = [pytest.mark.needs_root, pytest.mark.timing]  # it chooses by the clock

# Gradients of some MiB, which travel for half a second at 100 Mbit/s and next to no time at 10 Gbit/s
SETTINGS = {
    "model__layers": 2,
    "model__width": 256,
    "model__context_length": 64,
    "train__global_batch_size": 8,
    "train__micro_batch_size": 8,
    "train__evaluate_sequences": 8,
    "comm__bucket_mb": 1.0,
    "compression__codec": "auto",
    "compression__candidates": "none,fp16,topk",
    "log__every": 1,
}
LAUNCHER = ["mpirun", "-np", "2", "--host", "h1,h2", "-x", "PATH", "-x", "OMP_NUM_THREADS", "--bind-to", "none"]
FORECAST = r"codec auto: .*gradients should arrive after: (.*)"
OUTCOME = r"codec auto: gradients arrived after: .*; so (.*)"
STOPPED_EARLY = 75  # exit status


def compressed(choice: str) -> int:
    """How many buckets travel by topk; more than there are if it is all of them."""
    found = re.search(r"topk(?: for (\d+))?", choice)
    return int(found[1] or 10**6) if found else 0


def chosen(run_dir: Path, step: int) -> dict[str, list[str]]:
    """What a checkpoint says of the codec of each bucket."""
    state = json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    return dict(state["gradients"]["auto"])


def test_it_compresses_when_a_link_is_slow_and_keeps_to_it(cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    """Trained on a fast link that becomes slow, stopped, and resumed: then it does not measure again."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    cluster.set_links("10gbit")
    words = [*LAUNCHER, *command(small_data, run_dir, train__steps=100_000, **SETTINGS)]
    log.write_text("")
    with start(cluster.inside("h1", ["bash", "-c", 'exec "$@" >"$0" 2>&1', str(log), *words])) as job:

        def told(pattern: str, beyond: int = 0) -> re.Match[str]:
            deadline = time.monotonic() + 100
            while time.monotonic() < deadline and job.process.poll() is None:
                if found := re.compile(pattern).search(log.read_text(), beyond):
                    return found
                time.sleep(0.1)
            raise AssertionError(f"no {pattern!r} in\n{log.read_text()}")

        first = told(OUTCOME + r"\n")
        cluster.set_links("100mbit")
        parted = told("measuring anew", first.end())
        forecast = told(FORECAST + r"\n", parted.end())
        again = told(OUTCOME + r"\n", forecast.end())
        assert compressed(again[1]) > compressed(first[1])
        assert "topk" in forecast[1] and "topk" in again[1]
        job.process.send_signal(signal.SIGUSR1)  # mpirun passes it on, and ranks save
        assert job.finish(deadline=60).status == STOPPED_EARLY, log.read_text()
    step = max(losses(run_dir))
    assert step > 10
    before = chosen(run_dir, step)
    assert set(before["names"]) <= {"fp16", "topk", "none"}
    assert "topk" in before["names"]

    resumed = command(small_data, run_dir, "--resume", "latest", train__steps=step + 1, **SETTINGS)
    result = cluster.run("h1", [*LAUNCHER, *resumed])
    assert result.status == 0, result.output
    assert "should arrive" not in result.output  # it has not measured
    assert chosen(run_dir, step + 1) == before


def test_it_says_where_no_codec_keeps_steps_from_waiting(cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    cluster.set_links("100mbit")
    settings = {**SETTINGS, "compression__candidates": "none,fp16", "train__steps": 20}
    result = cluster.run("h1", [*LAUNCHER, *command(small_data, tmp_path / "run", **settings)])
    assert result.status == 0, result.output
    assert re.search(r"a step waits [\d.]+ ms for them even so: averages of local steps", result.output), result.output
