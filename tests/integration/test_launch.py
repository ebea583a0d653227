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
WORKERS = {"ray": "worker of Ray", "spark": "task of Spark"}  # what has started a rank
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
@pytest.mark.parametrize("what", ["rank", "worker"])
def test_a_kill(kind: str, what: str, small_data: Path, tmp_path: Path, by_mpirun: dict[int, float]) -> None:
    """Of a rank, or of the actor or task that has started it: all are started again, from the last checkpoint."""
    run_dir = tmp_path / "run"
    with start(words(kind, small_data, run_dir, checkpoint__every=10)) as job:
        wait_for(lambda: (run_dir / "checkpoints/latest").exists(), SECONDS, "checkpoint")
        process = rank_of(job, 1)
        os.kill(process.ppid() if what == "worker" else process.pid, signal.SIGKILL)
        result = job.finish(deadline=SECONDS)
    assert result.status == 0, result.output
    said = "rank 1 was killed by signal 9" if what == "rank" else f"a {WORKERS[kind]} has died"
    assert f"attempt 1 of 4: {said}" in result.output, result.output
    assert losses(run_dir) == by_mpirun


def rank_of(job: Job, rank: int) -> psutil.Process:
    """The process that is this rank."""
    for process in job.members():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:4] == ["-m", "hvdlm", "train"] and process.environ().get("RANK") == str(rank):
                return process
    pytest.fail(f"no rank {rank}")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere.invalid:6379"])
def test_no_cluster_at_an_address(address: str, small_data: Path, tmp_path: Path) -> None:
    hvdlm, *rest = words("ray", small_data, tmp_path / "run")
    rest[rest.index("--address") + 1] = address
    result = run([hvdlm, *rest], deadline=40)
    assert result.status == 1
    assert f"hvdlm: error: no Ray cluster at '{address}' (" in result.output, result.output


@pytest.mark.parametrize("kind", CLUSTERS)
def test_an_error_is_not_tried_again(kind: str, tmp_path: Path) -> None:
    result = run(words(kind, tmp_path / "nothing", tmp_path / "run"), deadline=SECONDS)
    assert result.status == 1
    assert re.search(r"hvdlm: error: rank \d ended with 1: hvdlm: error: .*nothing: no such data set", result.output)
    assert "attempt" not in result.output
