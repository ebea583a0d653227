"""What the tests of this folder share: emulated clusters, and the curve of one process alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, SharedCluster
from jobs import losses, train

# Emulated hosts have more slots than this machine has cores, which mpirun cannot know: ranks that wait make room
os.environ.update(OMPI_MCA_mpi_yield_when_idle="1")


# Files whose tests take longest: they come first, so that no worker of pytest-xdist is alone with one at the end
LONGEST = ("test_readme.py", "test_quickstart.py", "test_slurm.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedCluster]:
    """The cluster of two hosts that all tests use which do not need one of their own."""
    shared = SharedCluster(tmp_path_factory.mktemp("shared"))
    yield shared
    shared.close()


@pytest.fixture
def cluster(shared_cluster: SharedCluster) -> Iterator[Cluster]:
    """The shared cluster, set back after the test."""
    yield shared_cluster.get()
    left = shared_cluster.set_back()
    assert not left, f"left behind on the hosts: {left}"


@pytest.fixture(scope="module")
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Cluster]]:
    """`start_cluster(hosts, slots, *options)`: a `Cluster` that is up until the last test of the module has ended."""
    started: list[Cluster] = []

    def start(hosts: int, slots: int, *options: str) -> Cluster:
        started.append(Cluster.start(tmp_path_factory.mktemp("fabric"), hosts, slots, *options))
        return started[-1]

    yield start
    for cluster in started:
        cluster.down()


@pytest.fixture(scope="session")
def curve_alone(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The training loss of one process alone, by step, over 20 steps of `jobs.SETTINGS`."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    result = train("none", 1, small_data, run_dir, train__steps=20)
    assert result.status == 0, result.output
    curve = losses(run_dir)
    assert len(curve) == 20
    return curve
