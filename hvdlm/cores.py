"""How many cores this process may use: its affinity, and the CPU quota of its control groups."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")


def usable_cores() -> int:
    """Cores that this process can keep busy, at least 1.

    A container or a service with a quota of one and a half CPUs counts as one core: two threads would use up the quota
    before each period ends and then wait, also for one another.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(math.floor(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """CPUs that this process's control group, and each above it that can be seen, may use; none without a quota."""
    try:
        mounts = (PROC / "mountinfo").read_text(encoding="utf-8").splitlines()
        memberships = (PROC / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    # proc_pid_mountinfo(5): ID, parent, device, root, mount point, options, any number of fields, "-", type, source,
    # options of the file system. cgroups(7): hierarchy, controllers, path; version 2 has hierarchy 0.
    groups = [line.split(":", 2) for line in memberships if line.count(":") >= 2]
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        fields, (kind, *_, options) = before.split(), (after or "- -").split()
        if kind != "cgroup2" and (kind != "cgroup" or "cpu" not in options.split(",")):
            continue
        for hierarchy, controllers, path in groups:
            if hierarchy == "0" if kind == "cgroup2" else "cpu" in controllers.split(","):
                yield from _quotas_up(Path(fields[4]), path, fields[3])


def _quotas_up(mount: Path, path: str, root: str) -> Iterator[float]:
    """Quotas of the control group `path` and those above it, in a hierarchy whose `root` is mounted at `mount`."""
    # In a container, `path` may be as the host sees it, while what is mounted begins at the container's own group
    directory = mount / Path(path).relative_to(root) if Path(path).is_relative_to(root) else mount
    if not directory.is_dir():
        directory = mount
    for each in (directory, *directory.parents):
        yield from _quota(each)
        if each == mount:
            return


def _quota(directory: Path) -> Iterator[float]:
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text().split()
        else:
            quota = (directory / "cpu.cfs_quota_us").read_text().strip()
            period = (directory / "cpu.cfs_period_us").read_text().strip()
        if quota != "max" and int(quota) > 0:  # -1 for no quota in version 1
            yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return
