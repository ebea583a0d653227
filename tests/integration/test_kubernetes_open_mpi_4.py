"""The same rehearsal where the image has Debian's Open MPI 4, for which operators write the launcher's environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from disks import small_disk
from launcher import BIN
from pods import NAMES, Image, assert_trains_on_workers, pod_job

_BIN = Path("/usr/bin")

# mpi4py loads the library that this names, not the one beside it
_INSTALL = f"""
apt-get update -qq
apt-get install -qq -y --no-install-recommends openmpi-bin
printf '#!/bin/sh\nMPI4PY_LIBMPI=libmpi.so.40 exec {BIN}/hvdlm "$@"\n' >{_BIN}/hvdlm
chmod 755 {_BIN}/hvdlm
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    disk = tmp_path_factory.mktemp("image")
    with small_disk(disk, "3g"):
        image = Image(disk, leave_out=("apt-get", "/opt/hvdlm"))
        image.run(_INSTALL)
        yield image


@pytest.fixture(scope="module")
def hosts(image: Image, start_cluster: Callable[..., Cluster]) -> Cluster:
    """Begun after the image, whose file system they then see."""
    return start_cluster(3, 2)


@pytest.mark.thorough
@pytest.mark.needs_root
@pytest.mark.parametrize("kind", NAMES)
def test_a_job_trains_on_the_workers(
    kind: str, image: Image, hosts: Cluster, small_data: Path, curve_alone: dict[int, float], tmp_path: Path
) -> None:
    with pod_job(kind, image, _BIN, hosts, small_data, tmp_path / "volume") as job:
        assert "mpirun (Open MPI) 4." in job.launch([str(_BIN / "mpirun"), "--version"]).output
        assert_trains_on_workers(job, curve_alone)
