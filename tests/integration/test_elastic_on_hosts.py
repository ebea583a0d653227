"""A rank of one of two hosts dies: the others go on, across their network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import assert_same_curve, command, losses, records
from thorough import thorough

DYING = Path(__file__).parents[1] / "faults" / "dying.py"


@pytest.mark.needs_root
@pytest.mark.parametrize("rank", [0, thorough(3)])
def test_a_rank_of_one_host_dies(
    rank: int, cluster: Cluster, small_data: Path, tmp_path: Path, curve_alone: dict[int, float]
) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "two-by-two").write_text("h1 slots=2\nh2 slots=2\n")
    mpirun = ["mpirun", "--with-ft", "ulfm", "-np", "4", "--hostfile", "two-by-two", "-x", "PATH", "--bind-to", "none"]
    words = command(small_data, run_dir, train__steps=20, comm__elastic="true")[1:]
    result = cluster.run("h1", [*mpirun, sys.executable, str(DYING), f"backward:7:{rank}", *words], cwd=tmp_path)
    assert result.status == 0, result.output
    assert f"rank {rank} on h{1 if rank < 2 else 2} has died: 3 ranks go on from step 7" in result.output
    assert_same_curve(losses(run_dir), curve_alone, relative=1e-4)
    assert records(run_dir)[-1]["world_size"] == 3
