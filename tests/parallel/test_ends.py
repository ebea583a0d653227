"""How ranks end, and when they must not: real launchers, signals and kills."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from jobs import command, records, start_training, wait_for
from launcher import launcher_command, run

SABOTAGE = Path(__file__).with_name("sabotage.py")

DEADLINE = 90.0  # seconds


def steps_done(run_dir: Path) -> int:
    return len(records(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def test_an_error_of_one_rank_alone(small_data: Path, tmp_path: Path) -> None:
    """It waits in a collective operation for nobody, and the rank that has raised it says it."""
    words = command(small_data, tmp_path / "run")[1:]
    result = run([*launcher_command("mpirun", 2), sys.executable, str(SABOTAGE), "own_error", "1", *words])
    assert result.status == 1, result.output
    said = [line for line in result.output.splitlines() if "hvdlm: error: " in line]
    assert len(said) == 1, result.output
    assert re.search(r"hvdlm: error: rank 1 on \S+: the gradient norm is nan at step 1: lower optimizer.lr", said[0])
    assert "Traceback" not in result.output


@pytest.mark.parametrize("algorithm", ["ring", "engine"])
def test_ranks_that_are_suspended_together(small_data: Path, tmp_path: Path, algorithm: str) -> None:
    """For longer than comm.timeout, as a gang scheduler does; by engine torch, since Gloo has clocks of its own, for
    messages between two ranks, another for collectives."""
    run_dir = tmp_path / "run"
    timeout = 6  # seconds, in which a rank on a busy machine arrives
    settings = {"train__steps": 100_000, "comm__timeout": timeout, "comm__engine": "torch"}
    settings["comm__algorithm"] = algorithm
    with start_training("mpirun", 2, small_data, run_dir, **settings) as job:
        wait_for(lambda: steps_done(run_dir) > 3, job)
        ranks = job.ranks()
        assert len(ranks) == 2
        for process in ranks:
            process.suspend()
        time.sleep(timeout + 2)
        before = steps_done(run_dir)
        for process in ranks:
            process.resume()
        wait_for(lambda: steps_done(run_dir) > before + 20, job)
        ranks[0].send_signal(signal.SIGTERM)
        result = job.finish(DEADLINE)
    assert result.status == 75, result.output
    assert "hvdlm: error" not in result.output


def test_a_rank_under_horovodrun_that_is_killed(small_data: Path, tmp_path: Path) -> None:
    """The other one says at once whom it has lost, before horovodrun ends it."""
    run_dir = tmp_path / "run"
    settings = {"train__steps": 100_000, "comm__algorithm": "ring"}
    with start_training("horovodrun --gloo", 2, small_data, run_dir, **settings) as job:
        wait_for(lambda: steps_done(run_dir) > 3, job)
        job.ranks()[1].kill()
        result = job.finish(DEADLINE)
    assert result.status != 0
    host = os.uname().nodename
    said = re.search(r"hvdlm: error: (gradient bucket \d of \d: )?(rank 0 on .*)", result.output)
    assert said, result.output
    assert said[2].startswith(f"rank 0 on {host} has lost the connection with rank 1 on {host}: "), said[0]
    assert said[2].endswith(f"; rank 1 on {host} does not answer: stopped, dead, or out of reach"), said[0]


def test_ranks_whose_launcher_is_killed(small_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with start_training("horovodrun --gloo", 2, small_data, run_dir, train__steps=100_000) as job:
        wait_for(lambda: steps_done(run_dir) > 3, job)
        job.process.kill()
        wait_for(lambda: not any(process.is_running() for process in job.members()), job)
        saved = steps_done(run_dir)
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == [f"step_{saved:08}"]
