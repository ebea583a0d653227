"""A training job, one of whose ranks is killed; and how long it takes until a step ends again."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.processes import cause_of_failure, end_launcher, start_launcher
from hvdlm.errors import HvdlmError

# Seconds for which a job is waited for: to come to a step, and to end
_PATIENCE = 300.0
_POLL = 0.002


@dataclass(frozen=True)
class Trial:
    """What one death has cost."""

    rank: int  # of the launcher, that was killed
    step: int  # the last one that was logged before
    seconds: float  # from the kill to the end of the first step that the others have made without the dead one
    steps_repeated: int
    seconds_to_end: float  # from the last step to the end of the launcher
    losses: dict[int, float]  # of each step, as the run has logged it at last


@dataclass(frozen=True)
class Plan:
    """Which rank is killed, and when."""

    rank: int
    step: int  # the kill follows this one
    seconds: float  # after its end


def make_plan(seed: int, ranks: int, steps: int, step_seconds: float) -> Plan:
    """Any rank, at any moment of the middle half of a run."""
    draw = random.Random(seed)
    return Plan(draw.randrange(ranks), draw.randint(steps // 4, 3 * steps // 4), draw.uniform(0, step_seconds))


class Lines:
    """The training steps that a run has logged, each with the time at which it was seen."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "metrics.jsonl"
        self.losses: dict[int, float] = {}
        self.times: dict[int, float] = {}  # time.monotonic(), of the first time
        self.since_death: int | None = None  # the first step without the dead rank

    def read(self) -> None:
        """Looks once. Lines may have been dropped, and written again."""
        if not self._path.exists():
            return
        now, has_died = time.monotonic(), False
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                return
            has_died |= record["kind"] == "event" and " died: " in record["message"]
            if record["kind"] == "train":
                if has_died and self.since_death is None:
                    self.since_death = record["step"]
                self.losses[record["step"]] = record["loss"]
                self.times.setdefault(record["step"], now)

    @property
    def last(self) -> int:
        """The last step that was seen."""
        return max(self.times, default=0)

    def wait_for_survivors(self, job: subprocess.Popen[bytes]) -> float:
        """Until the first step without the dead rank has ended, and when that was."""
        while self.since_death is None:
            self.wait_for(self.last + 1, job)
        return self.times[self.since_death]

    def wait_for(self, step: int, job: subprocess.Popen[bytes]) -> None:
        """Until the step has ended. Raises HvdlmError if the job ends before, or after `_PATIENCE`."""
        end = time.monotonic() + _PATIENCE
        while self.last < step:
            if job.poll() is not None and (self.read() or self.last < step):
                raise HvdlmError(f"the job ended with status {job.returncode} at step {self.last}, before step {step}")
            if time.monotonic() > end:
                raise HvdlmError(f"step {step} has not ended within {_PATIENCE:g} s")
            time.sleep(_POLL)
            self.read()


def run_trial(
    start: Sequence[str], again: Sequence[str] | None, run_dir: Path, steps: int, plan: Plan, log: Path
) -> Trial:
    """Runs a job of `steps` steps. `again`: what begins anew once the job has ended of a death; None: it does not end.

    Raises HvdlmError if the last step is not reached, or the last launcher ends with an error.
    """
    lines = Lines(run_dir)
    with log.open("ab") as output:
        job = start_launcher(start, output)
        try:
            lines.wait_for(plan.step, job)
            time.sleep(plan.seconds)
            lines.read()
            before = lines.last
            killed = time.monotonic()
            _rank(run_dir, plan.rank).kill()
            repeated = 0
            if again is None:
                seconds = lines.wait_for_survivors(job) - killed
            else:
                job.wait(_PATIENCE)
                lines.read()
                before = lines.last
                job = start_launcher(again, output)
                repeated = before - _resumed_from(run_dir, before)
                lines.wait_for(before + 1, job)
                seconds = lines.times[before + 1] - killed
            lines.wait_for(steps, job)
            status = job.wait(_PATIENCE)
            ended = time.monotonic()
        except HvdlmError as error:
            raise HvdlmError(f"{error}: {cause_of_failure(log)}") from None
        finally:
            if job.poll() is None:
                end_launcher(job)
    if status:
        raise HvdlmError(f"the job ended with status {status}: {cause_of_failure(log)}")
    return Trial(plan.rank, before, seconds, repeated, ended - lines.times[steps], dict(lines.losses))


def _resumed_from(run_dir: Path, before: int) -> int:
    """The step of the newest checkpoint."""
    steps = [int(each.name.removeprefix("step_")) for each in (run_dir / "checkpoints").glob("step_" + "[0-9]" * 8)]
    return max((step for step in steps if step <= before), default=0)


def _rank(run_dir: Path, rank: int) -> psutil.Process:
    """The process of a rank that trains in `run_dir`."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended
            if process.environ().get("OMPI_COMM_WORLD_RANK") == str(rank) and str(run_dir) in process.cmdline():
                found.append(process)
    if not found:
        raise HvdlmError(f"rank {rank} of {run_dir} is not running")
    return found[-1]
