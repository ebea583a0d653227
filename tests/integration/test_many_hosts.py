"""Eight ranks on two hosts with networks of their own, started in every way there is, train one and the same curve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import assert_same_curve, command, losses, train

HOSTFILE = Path(__file__).parents[2] / "hostfiles" / "two-hosts.txt"
SHORT = {"train__steps": 20}

# The launcher line of each way, as its first words; "sbatch" is the rest of a script.
WAYS = {
    "horovodrun over Gloo": ["horovodrun", "-np", "8", "--hostfile", str(HOSTFILE), "--gloo"],
    "horovodrun over MPI": ["horovodrun", "-np", "8", "--hostfile", str(HOSTFILE), "--mpi"],
    "mpirun": ["mpirun", "-np", "8", "--hostfile", str(HOSTFILE), "-x", "PATH", "--bind-to", "none"],
    "sbatch and mpirun": ["sbatch", "--wait", "--nodes=2", "--ntasks-per-node=4"],
    "srun": ["srun", "--mpi=pmix", "--nodes=2", "--ntasks-per-node=4"],
}


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster(2, 4, "--slurm")


@pytest.fixture(scope="module")
def expected(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The curve of one process alone."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    result = train("none", 1, small_data, run_dir, **SHORT)
    assert result.status == 0, result.output
    return losses(run_dir)


@pytest.mark.parametrize("way", WAYS)
def test_one_curve(way: str, cluster: Cluster, small_data: Path, tmp_path: Path, expected: dict[int, float]) -> None:
    run_dir = tmp_path / "run"
    training = command(small_data, run_dir, **SHORT)
    launcher = WAYS[way]
    log = tmp_path / "job.out"
    if launcher[0] == "sbatch":
        script = tmp_path / "job.sh"
        script.write_text("#!/bin/bash\nmpirun --bind-to none " + " ".join(training) + "\n")
        words = [*launcher, "--output", str(log), str(script)]
    else:
        words = [*launcher, *training]
    result = cluster.run("h1", words, deadline=200)
    output = log.read_text() if log.exists() else result.output
    assert result.status == 0, output
    assert "8 ranks on 2 nodes" in output
    assert len(expected) == 20
    assert_same_curve(losses(run_dir), expected, relative=1e-4)
