"""How many cores this process may use: of those it is bound to, what the CPU quota of its control groups allows."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores of this process's CPU affinity, or fewer where a control group has a CPU quota; at least 1."""
    return max(1, min(len(os.sched_getaffinity(0)), int(_quota(Path("/proc/self/cgroup"), _CGROUPS))))


def _quota(membership: Path, mounted: Path) -> float:
    """The CPU quota in cores, infinite without one. A group's limit holds for all groups below it.

    `membership`: lines NUMBER:CONTROLLERS:PATH (cgroups(7)); version 2 has no controllers there. Inside a container the
    path may be that on the host, which is not there: the container's own group is then the root of what is mounted.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 10**9
    smallest = 10.0**9
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [mounted, mounted / "unified"] if not controllers else [mounted / "cpu", mounted / controllers]
        for root in roots:
            own = root / path.lstrip("/")
            for group in (own, *own.parents):
                if group.is_relative_to(root):
                    smallest = min(smallest, _quota_of(group))
    return smallest


def _quota_of(group: Path) -> float:
    """The quota of one group in cores, of either version of control groups."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (group / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        return int(quota) / int(period) if int(quota) > 0 else 10**9  # version 1: -1 is no limit
    except (OSError, ValueError, ZeroDivisionError):  # ValueError: version 2 says max
        return 10**9
