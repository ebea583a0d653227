"""Scaling studies on a host list, started from one of its hosts by each launcher."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from small_study import write_study
from thorough import thorough

from hvdlm.scaling.point import read_points

pytestmark = pytest.mark.needs_root


@pytest.mark.parametrize(("launcher", "ranks"), [("mpirun", [1, 2]), thorough("horovodrun", [2])])
def test_a_study_on_a_host_list(
    launcher: str, ranks: list[int], cluster: Cluster, small_data: Path, tmp_path: Path
) -> None:
    cluster.set_links("1gbit")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h1 slots=1\nh2 slots=1\n")
    more = {"hostfile": str(hostfile), "links": ["1gbit"], "ranks": ranks}
    result = cluster.run("h1", write_study(tmp_path, small_data, place="hostfile", launcher=launcher, **more))
    assert result.status == 0, result.output
    points = {point.ranks: point for point in read_points(tmp_path / "small-strong")}
    assert sorted(points) == ranks
    assert {number: point.place.hosts for number, point in points.items()} == {
        number: ["h1", "h2"][:number] for number in ranks
    }
    assert {number: point.place.link_bits_per_second for number, point in points.items()} == {
        number: {1: None, 2: 1e9}[number] for number in ranks
    }
    assert points[2].is_valid and points[2].place.launcher.startswith(launcher)
    assert len({point.tokens_per_step for point in points.values()}) == 1
