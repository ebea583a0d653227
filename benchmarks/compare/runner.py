"""Measures all systems round by round, a few steps each, in an order that rotates from round to round.

All systems run at the same time but only one is not suspended, so other load on the machine affects all alike, and
ratios within a round are between measurements that are close in time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.setups import Cluster, Setup, open_cluster
from compare.job import Job, JobCrashError
from compare.measurement import Measurement, Request, SystemResult, relative_distance
from compare.registry import LIMIT, REFERENCE, SystemGroup, steps_of_a_round, table_order
from hvdlm.config import Config

MAX_STARTS = 10  # of a job that crashes


def measure_setup(
    setup: Setup, groups: Sequence[SystemGroup], config: Config, rounds: int, steps: int
) -> list[SystemResult]:
    """Starts the hosts of a set-up, and measures every system there as `measure_all` does."""
    with (
        tempfile.TemporaryDirectory(prefix="hvdlm-compare-") as directory,
        open_cluster(setup, Path(directory, "fabric")) as cluster,
    ):
        scratch = Path(directory, "jobs")
        scratch.mkdir()
        return measure_all(cluster, groups, config, rounds, steps, scratch)


def measure_all(
    cluster: Cluster, groups: Sequence[SystemGroup], config: Config, rounds: int, steps: int, scratch: Path
) -> list[SystemResult]:
    """Starts one job per group and measures every system, `steps` steps in each of `rounds` rounds.

    `scratch`: an empty directory that all ranks can read. Raises AssertionError if ranks hold different models.
    """
    settings = scratch / "config.toml"
    settings.write_text(config.to_toml(), encoding="utf-8")
    jobs = [
        _RestartingJob(cluster, group, settings, steps, scratch / str(number)) for number, group in enumerate(groups)
    ]
    by_name = {name: job for job in jobs for name in job.group.names}
    names = table_order(list(by_name))
    results = {name: SystemResult(name) for name in names}
    try:
        for job in jobs:
            print(f"{cluster.setup.name}: starting {', '.join(job.group.names)}", file=sys.stderr)
            job.start()
        for number in range(rounds):
            print(f"{cluster.setup.name}: round {number + 1} of {rounds}", file=sys.stderr)
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                results[name].measurements.append(by_name[name].measure(name))
    finally:
        for job in jobs:
            job.close()
    reference = by_name[REFERENCE].parameters(REFERENCE)
    for name, result in results.items():
        job, own = by_name[name], by_name[name].parameters(name)
        result.starts, result.crashes = job.starts, job.crashes
        if name != LIMIT and steps_of_a_round(name) == 1 and own.exists() and reference.exists():
            result.relative_distance = relative_distance(own, reference, config)
    return list(results.values())


class _RestartingJob:
    """The job of a group, started again when it has crashed, `MAX_STARTS` times in all."""

    def __init__(self, cluster: Cluster, group: SystemGroup, settings: Path, steps: int, scratch: Path) -> None:
        self.group = group
        self.starts = 0
        self.crashes: list[str] = []
        self._cluster, self._settings, self._steps, self._scratch = cluster, settings, steps, scratch
        self._job: Job | None = None
        scratch.mkdir()

    def parameters(self, name: str) -> Path:
        """The file with a system's parameters after its warm-up."""
        return self._scratch / f"{self.group.names.index(name)}.pt"

    def start(self) -> None:
        """Starts the job, and warms every system up by the steps of one round."""
        while self._job is None and self.starts < MAX_STARTS:
            self.starts += 1
            try:
                self._job = Job(self._cluster, self.group, self._settings, self._scratch)
                for name in self.group.names:
                    self._job.measure(Request(name, self._steps_of(name), self.parameters(name)))
            except JobCrashError as crash:
                self._record(crash)

    def measure(self, name: str) -> Measurement | None:
        """None if the job crashes meanwhile, or has crashed too often."""
        self.start()
        if self._job is None:
            return None
        try:
            return self._job.measure(Request(name, self._steps_of(name)))
        except JobCrashError as crash:
            self._record(crash)
            return None

    def close(self) -> None:
        """Ends the job."""
        if self._job is not None:
            self._job.close()

    def _steps_of(self, name: str) -> int:
        """Measured steps in a round: whole rounds of local steps."""
        together = steps_of_a_round(name)
        return -(-self._steps // together) * together

    def _record(self, crash: JobCrashError) -> None:
        print(f"{', '.join(self.group.names)}: crash {len(self.crashes) + 1}: {crash}", file=sys.stderr)
        self.crashes.append(str(crash))
        self._job = None
