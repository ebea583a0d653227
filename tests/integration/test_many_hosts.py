"""Ranks on two hosts with networks of their own train the curve of one process alone.

Started here in two ways; test_readme.py has eight ranks by horovodrun over MPI, by mpirun, and by a job under Slurm.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from jobs import assert_same_curve, command, losses

# The launcher line of each way, before the program
WAYS = {
    "horovodrun over Gloo": ["horovodrun", "-np", "4", "--hostfile", "two-by-two", "--gloo"],
    "srun": ["srun", "--mpi=pmix", "--nodes=2", "--ntasks-per-node=2"],
}


@pytest.mark.needs_slurm
@pytest.mark.parametrize("way", WAYS)
def test_one_curve(way: str, cluster: Cluster, small_data: Path, tmp_path: Path, curve_alone: dict[int, float]) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "two-by-two").write_text("h1 slots=2\nh2 slots=2\n")
    words = [*WAYS[way], *command(small_data, run_dir, train__steps=20)]
    result = cluster.run("h1", words, deadline=200, cwd=tmp_path)
    assert result.status == 0, result.output
    assert "4 ranks on 2 nodes" in result.output
    assert_same_curve(losses(run_dir), curve_alone, relative=1e-4)
