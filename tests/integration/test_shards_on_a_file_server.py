"""Ranks of a host whose data lie on a file server behind 100 Mbit/s: with `data.cache` each byte comes once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import command, losses, records
from launcher import run

RATE = "100mbit"
SFTP_SERVER = "/usr/lib/openssh/sftp-server"


@pytest.fixture
def mounted(cluster: Cluster, small_data: Path, tmp_path: Path) -> Iterator[Path]:
    """The small data set as h1 sees it by sshfs from h2, without the kernel's cache."""
    cluster.set_links(RATE)
    there = tmp_path / "mounted"
    there.mkdir()
    words = ["sshfs", f"h2:{small_data}", there, "-o", f"direct_io,ro,sftp_server={SFTP_SERVER}"]
    assert cluster.run("h1", words, may_go_on=True).status == 0
    yield there
    cluster.run("h1", ["umount", "-l", there], may_go_on=True)


def received(cluster: Cluster) -> int:
    """Bytes that h1 has received."""
    interface = f"/proc/{cluster.first_process('h1')}/net/dev"
    lines = [line.split(":") for line in Path(interface).read_text().splitlines()[2:]]
    return sum(int(numbers.split()[0]) for name, numbers in lines if name.strip() != "lo")


@pytest.mark.needs_sshfs
def test_each_byte_comes_once(cluster: Cluster, mounted: Path, small_data: Path, tmp_path: Path) -> None:
    """A second run reads nothing but headers from the file server; without `data.cache` each read comes anew."""
    size = sum(path.stat().st_size for path in small_data.rglob("shard_*.h5"))
    cache = tmp_path / "cache"
    mpirun = ["mpirun", "-np", "2", "--host", "h1:2", "-x", "PATH", "-x", "OMP_NUM_THREADS", "--bind-to", "none"]
    came = {}
    for name in ("makes", "finds", "without"):
        before = received(cluster)
        words = command(mounted, tmp_path / name, train__steps=100, data__cache="" if name == "without" else cache)
        result = run(cluster.inside("h1", [*mpirun, *words]), deadline=120, cwd=tmp_path)
        assert result.status == 0, result.output
        came[name] = received(cluster) - before
        if name == "makes":
            shards = [path for path in cache.rglob("*") if path.is_file()]
            assert shards and all(path.suffix == ".h5" for path in shards)
    assert losses(tmp_path / "makes") == losses(tmp_path / "finds") == losses(tmp_path / "without")
    assert records(tmp_path / "finds")[-1]["cache_hits"] == 1
    assert came["finds"] < 0.3 * size < 4 * size < came["without"], (came, size)
