"""Emulated clusters for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from cluster import Cluster


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
