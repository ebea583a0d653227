"""A host that others no longer reach: they name it and end, and with them the launcher."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import command, losses
from launcher import start
from waiting import wait_for


@pytest.mark.needs_root
def test_a_host_that_is_cut_off_ends_the_job(cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    """Though mpirun waits for that host for ever: it is killed."""
    run_dir = tmp_path / "run"
    words = command(small_data, run_dir, train__steps=100_000, comm__timeout=15)
    mpirun = ["mpirun", "-np", "2", "--host", "h1:1,h2:1", "-x", "PATH", "-x", "OMP_NUM_THREADS", "--bind-to", "none"]
    try:
        with start(cluster.inside("h1", [*mpirun, *words]), cwd=tmp_path) as job:
            wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) > 3, 90, "fourth step")
            cluster.fabric.link("h2", "down")
            result = job.finish(deadline=90)
    finally:
        cluster.fabric.link("h2", "up")
        cluster.end_jobs()  # of the host that was cut off
    assert result.status not in (0, 75), result.output
    assert re.search(r"rank 0 on h1 waited 15 s \(comm.timeout\) .* h2", result.output), result.output
