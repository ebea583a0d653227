"""How many cores a process may use: its affinity, and the quota of control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvdlm import cores
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.cores import usable_cores
from hvdlm.training import hardware
from hvdlm.training.hardware import share_cores


def group(mounted: Path, path: str, **files: str) -> None:
    """A control group with files whose names have __ for the dot."""
    (mounted / path).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (mounted / path / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return tmp_path / "membership"


@pytest.mark.parametrize(("text", "expected"), [("150000 100000", 1.5), ("max 100000", 10**9), ("25000 100000", 0.25)])
def test_the_quota_of_version_2(membership: Path, tmp_path: Path, text: str, expected: float) -> None:
    membership.write_text("0::/job/step\n")
    group(tmp_path, "job/step", cpu__max=text)
    group(tmp_path, "job", cpu__max="max 100000")
    assert cores._quota(membership, tmp_path) == expected


def test_the_quota_of_a_group_above_counts(membership: Path, tmp_path: Path) -> None:
    membership.write_text("0::/job/step\n")
    group(tmp_path, "job/step", cpu__max="800000 100000")
    group(tmp_path, "job", cpu__max="300000 100000")
    assert cores._quota(membership, tmp_path) == 3


@pytest.mark.parametrize(("quota", "expected"), [("200000", 2), ("-1", 10**9)])
def test_the_quota_of_version_1(membership: Path, tmp_path: Path, quota: str, expected: float) -> None:
    membership.write_text("5:memory:/elsewhere\n3:cpu,cpuacct:/docker/0123\n1:name=systemd:/docker/0123\n")
    group(tmp_path, "cpu,cpuacct/docker/0123", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    group(tmp_path, "memory/elsewhere", cpu__cfs_quota_us="1000", cpu__cfs_period_us="100000")
    assert cores._quota(membership, tmp_path) == expected


def test_in_a_container_the_root_of_what_is_mounted_is_its_own_group(membership: Path, tmp_path: Path) -> None:
    membership.write_text("3:cpu:/docker/0123\n")
    group(tmp_path, "cpu", cpu__cfs_quota_us="100000", cpu__cfs_period_us="100000")
    assert cores._quota(membership, tmp_path) == 1


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cores._quota(tmp_path / "none", tmp_path) == 10**9


@pytest.mark.parametrize(("quota", "expected"), [(0.5, 1), (1.5, 1), (2.0, 2), (3.9, 3), (10**9, 4)])
def test_usable_cores(monkeypatch: pytest.MonkeyPatch, quota: float, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "_quota", lambda *_: quota)
    assert usable_cores() == expected


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
