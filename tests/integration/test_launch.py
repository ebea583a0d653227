"""`hvdlm launch` on clusters of Ray and Spark on this machine: the losses of mpirun, and ranks that die."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from cluster import Cluster
from jobs import command, losses, train
from launcher import Job, run, start
from waiting import wait_for

CLUSTERS = {"ray": "local", "spark": "local[2]"}
SECONDS = 200
pytestmark = pytest.mark.timeout(2 * SECONDS)


def words(kind: str, data: Path, run_dir: Path, **overrides: object) -> list[str]:
    hvdlm, _, config, *settings = command(data, run_dir, **overrides)
    options = ["--ranks", "2", "--address", CLUSTERS[kind]]
    return [hvdlm, "launch", kind, config, *options, *settings]


@pytest.fixture(scope="module")
def by_mpirun(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    run_dir = tmp_path_factory.mktemp("mpirun") / "run"
    assert train("mpirun", 2, small_data, run_dir).status == 0
    return losses(run_dir)


@pytest.mark.parametrize("kind", CLUSTERS)
def test_the_losses_of_mpirun(kind: str, small_data: Path, tmp_path: Path, by_mpirun: dict[int, float]) -> None:
    result = run(words(kind, small_data, tmp_path / "run"), deadline=SECONDS)
    assert result.status == 0, result.output
    assert losses(tmp_path / "run") == by_mpirun


@pytest.mark.parametrize("launcher", ["horovodrun --gloo", "horovodrun --mpi"])
def test_horovodrun_has_them_too(launcher: str, small_data: Path, tmp_path: Path, by_mpirun: dict[int, float]) -> None:
    assert train(launcher, 2, small_data, tmp_path / "run").status == 0
    assert losses(tmp_path / "run") == by_mpirun


@pytest.mark.needs_slurm
def test_srun_has_them_too(cluster: Cluster, small_data: Path, tmp_path: Path, by_mpirun: dict[int, float]) -> None:
    srun = ["srun", "--mpi=pmix", "--nodes=2", "--ntasks-per-node=1"]
    result = cluster.run("h1", [*srun, *command(small_data, tmp_path / "run")], deadline=SECONDS, cwd=tmp_path)
    assert result.status == 0, result.output
    assert losses(tmp_path / "run") == by_mpirun


@pytest.mark.parametrize("kind", CLUSTERS)
def test_a_rank_that_is_killed(kind: str, small_data: Path, tmp_path: Path, by_mpirun: dict[int, float]) -> None:
    """All are started again, from the last checkpoint: the same losses."""
    run_dir = tmp_path / "run"
    with start(words(kind, small_data, run_dir, checkpoint__every=10)) as job:
        wait_for(lambda: (run_dir / "checkpoints/latest").exists(), SECONDS, "checkpoint")
        os.kill(rank_of(job, 1), signal.SIGKILL)
        result = job.finish(deadline=SECONDS)
    assert result.status == 0, result.output
    assert "attempt 1 of 4: rank 1 was killed by signal 9" in result.output, result.output
    assert losses(run_dir) == by_mpirun


def rank_of(job: Job, rank: int) -> int:
    """The number of the process that is this rank."""
    for process in job.members():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:4] == ["-m", "hvdlm", "train"] and process.environ().get("RANK") == str(rank):
                return int(process.pid)
    pytest.fail(f"no rank {rank}")


@pytest.mark.parametrize("kind", CLUSTERS)
def test_an_error_is_not_tried_again(kind: str, tmp_path: Path) -> None:
    result = run(words(kind, tmp_path / "nothing", tmp_path / "run"), deadline=SECONDS)
    assert result.status == 1
    assert re.search(r"hvdlm: error: rank \d ended with 1: hvdlm: error: .*nothing: no such data set", result.output)
    assert "attempt" not in result.output
