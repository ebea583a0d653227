"""Eight ranks on two hosts with networks of their own train the curve of one process alone.

Started here in two ways; test_readme.py has horovodrun over MPI, mpirun, and a Slurm job with mpirun.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from jobs import assert_same_curve, command, losses

HOSTFILE = Path(__file__).parents[2] / "hostfiles" / "two-hosts.txt"

# The launcher line of each way
WAYS = {
    "horovodrun over Gloo": ["horovodrun", "-np", "8", "--hostfile", str(HOSTFILE), "--gloo"],
    "srun": ["srun", "--mpi=pmix", "--nodes=2", "--ntasks-per-node=4"],
}


@pytest.mark.needs_slurm
@pytest.mark.parametrize("way", WAYS)
def test_one_curve(way: str, cluster: Cluster, small_data: Path, tmp_path: Path, curve_alone: dict[int, float]) -> None:
    run_dir = tmp_path / "run"
    result = cluster.run("h1", [*WAYS[way], *command(small_data, run_dir, train__steps=20)], deadline=200)
    assert result.status == 0, result.output
    assert "8 ranks on 2 nodes" in result.output
    assert_same_curve(losses(run_dir), curve_alone, relative=1e-4)
