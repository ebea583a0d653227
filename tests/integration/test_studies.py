"""Scaling studies on a host list, started from one of its hosts by each launcher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from small_study import write_study

from hvdlm.scaling.point import read_points


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster(2, 1, "--rate", "1gbit")


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])
def test_a_study_on_a_host_list(launcher: str, cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    more = {"hostfile": str(cluster.hostfile), "links": ["1gbit"]}
    result = cluster.run("h1", write_study(tmp_path, small_data, place="hostfile", launcher=launcher, **more))
    assert result.status == 0, result.output
    one, two = sorted(read_points(tmp_path / "small-strong"), key=lambda point: point.ranks)
    assert (one.place.hosts, two.place.hosts) == (["h1"], ["h1", "h2"])
    assert (one.place.link_bits_per_second, two.place.link_bits_per_second) == (None, 1e9)
    assert two.is_valid and two.place.launcher.startswith(launcher)
    assert one.tokens_per_step == two.tokens_per_step
