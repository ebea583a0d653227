"""`hvdlm serve` on two hosts: each has half of the model, as the kernel counts what a worker sends."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import assert_same_curve, command, losses, records

pytestmark = pytest.mark.needs_root

PARAMETERS = 34_720  # of the model in jobs.SETTINGS
STEPS, SHARES = 20, 2
PORT = 7411

# Servers, then a worker beside the first one; prints what that host has sent meanwhile
SCRIPT = """
{servers} &
until grep -qs 'listens at' {run}/metrics.jsonl; do sleep 0.2; kill -0 $! || exit 1; done
sent() {{ cat /sys/class/net/eth0/statistics/tx_bytes; }}
before=$(sent)
{worker} || exit 1
echo "sent $(($(sent) - before))"
wait $!
"""


def test_each_server_has_half(
    cluster: Cluster, small_data: Path, tmp_path: Path, curve_alone: dict[int, float]
) -> None:
    """The curve is that of training alone; half of the gradients go to the other host, for each share once."""
    settings = {"train__steps": STEPS, "server__max_staleness": 4, "server__shares": SHARES}
    program, _, *served = command(small_data, tmp_path / "run", server__listen=f"0.0.0.0:{PORT}", **settings)
    launcher = ["mpirun", "-np", "2", "--host", "h1,h2", "-x", "PATH", "-x", "OMP_NUM_THREADS", "--bind-to", "none"]
    where = {"server__address": f"127.0.0.1:{PORT}", "server__token_file": tmp_path / "run" / "token"}
    worker = command(small_data, tmp_path / "worker", **settings, **where)
    script = SCRIPT.format(
        servers=shlex.join(map(str, [*launcher, program, "serve", *served])),
        worker=shlex.join(map(str, worker)),
        run=shlex.quote(str(tmp_path / "run")),
    )
    result = cluster.run("h1", script, deadline=200)
    assert result.status == 0, result.output
    assert_same_curve(losses(tmp_path / "run"), curve_alone, relative=1e-5)
    assert {record["world_size"] for record in records(tmp_path / "run")} == {1}
    found = re.search(r"sent (\d+)", result.output)
    assert found
    assert int(found[1]) == pytest.approx(STEPS * SHARES * 4 * PARAMETERS / 2, rel=0.2)  # headers and orders beside
