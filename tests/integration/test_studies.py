"""Scaling studies on a host list, started from one of its hosts by each launcher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster

from hvdlm.scaling.point import read_points

STUDY = """
name = "small"
place = "hostfile"
hostfile = {hostfile!r}
launcher = {launcher!r}
ranks = [1, 2]
links = ["1gbit"]
codecs = ["none"]
batch_sizes = [4]
repetitions = 1
steps = 2
data = {data!r}
settings.model = {{ layers = 1, heads = 2, width = 32, context_length = 32 }}
"""


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster(2, 1, "--rate", "1gbit")


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_a_study_on_a_host_list(launcher: str, cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(hostfile=str(cluster.hostfile), launcher=launcher, data=str(small_data)))
    script = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
    result = cluster.run("h1", [sys.executable, str(script), "strong", str(study), "--output", str(tmp_path)])
    assert result.status == 0, result.output
    one, two = sorted(read_points(tmp_path / "small-strong"), key=lambda point: point.ranks)
    assert (one.place.hosts, two.place.hosts) == (["h1"], ["h1", "h2"])
    assert (one.place.link_bits_per_second, two.place.link_bits_per_second) == (None, 1e9)
    assert two.is_valid and two.place.launcher.startswith(launcher)
    assert one.tokens_per_step == two.tokens_per_step
