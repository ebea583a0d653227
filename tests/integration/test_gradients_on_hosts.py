"""Gradients between hosts: sums by node and between nodes, and bytes on the wire as the kernel counts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import assert_same_curve, command, losses, records, train


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster(2, 2)


def train_on_hosts(cluster: Cluster, ranks: int, data: Path, run_dir: Path, **overrides: object) -> None:
    """Two hosts; `ranks` in all."""
    each = ranks // 2
    launcher = ["mpirun", "-np", str(ranks), "--host", f"h1:{each},h2:{each}", "-x", "PATH", "-x", "OMP_NUM_THREADS"]
    words = [*launcher, "--bind-to", "none", *command(data, run_dir, **overrides)]
    result = cluster.run("h1", words)
    assert result.status == 0, result.output


@pytest.mark.parametrize(
    ("codec", "engine", "within"), [("none", "mpi", 1e-4), ("none", "torch", 1e-4), ("fp16", "mpi", 0.01)]
)
def test_by_node(codec: str, engine: str, within: float, cluster: Cluster, small_data: Path, tmp_path: Path) -> None:
    """The same sums, of which every number crosses between the hosts once each way, not once a rank."""
    settings = {"train__steps": 20, "compression__codec": codec, "comm__engine": engine}
    assert train("none", 1, small_data, tmp_path / "alone", train__steps=20).status == 0
    train_on_hosts(cluster, 4, small_data, tmp_path / "run", compression__by_node="true", **settings)
    assert_same_curve(losses(tmp_path / "run"), losses(tmp_path / "alone"), relative=within)
    parameters = 34_720
    bytes_a_number = {"none": 4, "fp16": 2}[codec]
    sent = {int(str(record["wire_bytes"])) for record in records(tmp_path / "run")}
    assert all(each == pytest.approx(bytes_a_number * parameters, rel=0.01) for each in sent)


def bytes_sent(cluster: Cluster) -> int:
    """By the first host, since it is up."""
    result = cluster.run("h1", ["cat", "/sys/class/net/eth0/statistics/tx_bytes"])
    assert result.status == 0, result.output
    return int(result.output)


@pytest.mark.parametrize("codec", ["none", "fp16", "int4", "topk", "powersgd"])
def test_wire_bytes_are_what_the_interface_counts(
    codec: str, cluster: Cluster, small_data: Path, tmp_path: Path
) -> None:
    """Of thirty steps more, so that what a run sends at its beginning and end is left out."""
    settings = {"model__width": 256, "train__micro_batch_size": 8, "train__check_replicas_every": 0}
    settings |= {"compression__codec": codec, "train__evaluate_sequences": 2, "log__every": 100}
    settings["comm__algorithm"] = "ring"  # no trial at the start, which sends as much as it has time for
    counted = []
    for steps in (10, 40):
        before = bytes_sent(cluster)
        train_on_hosts(cluster, 2, small_data, tmp_path / str(steps), train__steps=steps, **settings)
        counted.append(bytes_sent(cluster) - before)
    (last,) = records(tmp_path / "40")
    told = 30 * int(str(last["wire_bytes"]))
    assert told > 30 * 10_000
    assert counted[1] - counted[0] == pytest.approx(told, rel=0.05)
