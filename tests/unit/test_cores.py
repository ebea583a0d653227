"""Usable cores: affinity, and quotas as the kernel writes them for control groups of version 1 and 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvdlm import cores
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.cores import usable_cores
from hvdlm.training import hardware
from hvdlm.training.hardware import share_cores


def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mounts: str, groups: str, files: dict[str, str]) -> None:
    """Eight cores by affinity; `mounts` and `groups` in /proc/self, and `files` of the control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cores, "PROC", tmp_path)
    (tmp_path / "mountinfo").write_text(mounts.replace("MOUNT", str(tmp_path / "mount")))
    (tmp_path / "cgroup").write_text(groups)
    for name, content in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(content)


VERSION_2 = "25 1 8:1 / / rw - ext4 /dev/sda1 rw\n31 25 0:28 / MOUNT rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
VERSION_1 = (
    "32 31 0:29 ROOT MOUNT rw - cgroup cgroup rw,cpu,cpuacct\n33 31 0:30 / /memory rw - cgroup cgroup rw,memory\n"
)


@pytest.mark.parametrize(
    ("files", "usable"),
    [
        ({}, 8),
        ({"a/b/cpu.max": "max 100000\n"}, 8),
        ({"a/b/cpu.max": "300000 100000\n"}, 3),
        ({"a/b/cpu.max": "150000 100000\n"}, 1),
        ({"a/b/cpu.max": "20000 100000\n"}, 1),
        ({"a/b/cpu.max": "2000000 100000\n"}, 8),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 50000\n"}, 4),
        ({"a/b/cpu.max": "nonsense\n"}, 8),
    ],
)
def test_quota_of_version_2(
    files: dict[str, str], usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, VERSION_2, "0::/a/b\n", files)
    assert usable_cores() == usable


@pytest.mark.parametrize(
    ("root", "directory"),
    [("/", "docker/x/"), ("/docker/x", ""), ("/docker", "x/"), ("/elsewhere", "")],
    ids=["host", "container", "nested", "container of another view"],
)
@pytest.mark.parametrize(("quota", "usable"), [("-1", 8), ("200000", 2)])
def test_quota_of_version_1(
    root: str, directory: str, quota: str, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{directory}cpu.cfs_quota_us": f"{quota}\n", f"{directory}cpu.cfs_period_us": "100000\n"}
    groups = "5:memory:/other\n4:cpu,cpuacct:/docker/x\n0::/\n"
    plant(monkeypatch, tmp_path, VERSION_1.replace("ROOT", root), groups, files)
    assert usable_cores() == usable


def test_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cores, "PROC", tmp_path / "nowhere")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert usable_cores() == len(allowed)


@pytest.mark.parametrize(
    ("usable", "bound_alike", "local_size", "expected"),
    [
        (8, 2, 2, 4),  # both ranks of a host may use its 8 cores
        (8, 1, 2, 8),  # each is bound to 8 of its own
        (2, 2, 2, 1),  # a quota of two cores
        (4, 1, 2, 2),  # a quota of four, although each is bound to cores of its own
        (1, 2, 2, 1),
    ],
)
def test_threads_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, usable: int, bound_alike: int, local_size: int, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(hardware, "usable_cores", lambda: usable)
    monkeypatch.setattr(hardware.torch, "set_num_threads", lambda _: None)
    communicator = SoloCommunicator()
    communicator.local_size = local_size
    monkeypatch.setattr(communicator, "all_gather_object", lambda own: [own] * bound_alike)
    assert share_cores(0, communicator) == expected
