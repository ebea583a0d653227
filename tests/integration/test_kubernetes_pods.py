"""What `hvdlm kubernetes` writes, rehearsed: pods without root on an emulated cluster, with keys, host list and
variables as the operators set them up, under the Open MPI 5 that is installed here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from disks import small_disk
from launcher import BIN
from pods import NAMES, Image, PodJob, assert_trains_on_workers, pod_job


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Without what needs a network: packages are this machine's, and hvdlm that which is tested."""
    disk = tmp_path_factory.mktemp("image")
    with small_disk(disk, "2g"):
        yield Image(disk, leave_out=("apt-get", "/opt/hvdlm"))


@pytest.fixture(scope="module")
def hosts(image: Image, start_cluster: Callable[..., Cluster]) -> Cluster:
    """Begun after the image, whose file system they then see."""
    return start_cluster(3, 2)


@pytest.fixture(params=NAMES)
def job(
    request: pytest.FixtureRequest, image: Image, hosts: Cluster, small_data: Path, tmp_path: Path
) -> Iterator[PodJob]:
    with pod_job(request.param, image, BIN, hosts, small_data, tmp_path / "volume") as made:
        yield made


@pytest.mark.needs_root
def test_a_job_trains_on_the_workers(job: PodJob, curve_alone: dict[int, float]) -> None:
    assert_trains_on_workers(job, curve_alone)


@pytest.mark.needs_root
def test_a_job_that_comes_up_short_ends_with_the_cause(job: PodJob) -> None:
    """By mpirun that goes by the operators' variables alone, which Open MPI 5 does not know; and by a list without one
    of the workers."""
    mpirun, train = job.command[2], job.command[job.command.index("train") - 1 :]
    result = job.launch([mpirun, "-np", "4", "--oversubscribe", *train])
    assert result.status != 0
    said = r"train.nodes = 2, but 4 ranks were started, on 1 node: name all hosts"
    assert re.search(said, result.output), result.output
    result = job.launch([mpirun, "-np", "2", *train])
    assert result.status != 0
    assert re.search(r"train.ranks = 4, but 2 ranks were started, on 1 node: name as many", result.output), (
        result.output
    )
    hostfile = job.files / "etc/mpi/hostfile"
    hostfile.write_text(hostfile.read_text().splitlines()[0] + "\n")
    result = job.launch(job.command)
    assert result.status != 0
    assert "not enough slots" in result.output, result.output


@pytest.mark.thorough
@pytest.mark.needs_root
@pytest.mark.timeout(1500)
def test_all_steps_of_the_containerfile(tmp_path: Path) -> None:
    """Over this machine's file system and network: in the end user 1000 has ranks that can train."""
    disk = tmp_path / "disk"
    with small_disk(disk, "12g"):
        image = Image(disk)
        ranks = "/opt/hvdlm/.venv/bin/mpirun -np 2 --bind-to none --oversubscribe /opt/hvdlm/.venv/bin/hvdlm doctor"
        image.run(f"su hvdlm --command {shlex.quote(ranks)}")
