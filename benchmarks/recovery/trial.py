"""A training job, one of whose ranks is killed; and how long it takes until a step ends again."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.processes import cause_of_failure, end_launcher, start_launcher
from hvdlm.errors import HvdlmError
from recovery.step_lines import PATIENCE, Lines, LoggedStep


@dataclass(frozen=True)
class Job:
    """How a system trains in one directory."""

    start: Sequence[str]  # its launcher's command
    again: Sequence[str] | None  # what begins once the job has ended of a death; None: it does not end
    lines: Lines
    word: str  # among the words of the command of each rank, and of no other job
    rank_variables: Mapping[str, str]  # environment variables of a rank, with {rank} for its number


@dataclass(frozen=True)
class Plan:
    """Which rank is killed, and when."""

    rank: int
    step: int  # the kill follows this one
    moment: float  # in the step after it, 0 to 1


@dataclass(frozen=True)
class Trial:
    """What one death has cost."""

    rank: int  # of the launcher, that was killed
    step: int  # the last one that was logged before
    seconds: float  # from the kill to the end of the first step that nobody had ended before, without the dead rank
    steps_repeated: int
    samples_repeated: int
    samples_lost: int  # of all global batches, those that entered no step
    seconds_to_end: float  # from the last step to the end of the launcher


def make_plan(seed: int, ranks: int, steps: int) -> Plan:
    """Any rank, at any moment of the middle half of a run."""
    draw = random.Random(seed)
    return Plan(draw.randrange(ranks), draw.randint(steps // 4, 3 * steps // 4), draw.random())


def run_undisturbed(job: Job, steps: int, log: Path) -> tuple[dict[int, LoggedStep], float]:
    """The steps of a run in which nobody dies, and the seconds of a step. Raises HvdlmError if it fails."""
    with log.open("wb") as output:
        launcher = start_launcher(job.start, output)
        try:
            job.lines.wait_for(steps, launcher)
            launcher.wait(PATIENCE)
        except HvdlmError as error:
            raise HvdlmError(f"{error}: {cause_of_failure(log)}") from None
        finally:
            if launcher.poll() is None:
                end_launcher(launcher)
    job.lines.read()
    times = job.lines.times
    return job.lines.steps(), (times[steps] - times[steps // 4]) / (steps - steps // 4)


def run_trial(
    job: Job, steps: int, batch_size: int, step_seconds: float, plan: Plan, log: Path
) -> tuple[Trial, dict[int, LoggedStep]]:
    """Runs a job of `steps` steps, and kills a rank; returns the steps that it has logged at last, too.

    Raises HvdlmError if the last step is not reached, or the last launcher ends with an error.
    """
    lines = job.lines
    with log.open("ab") as output:
        launcher = start_launcher(job.start, output)
        try:
            lines.wait_for(plan.step, launcher)
            time.sleep(plan.moment * step_seconds)
            lines.read()
            before = lines.last
            killed = time.monotonic()
            _find_rank(job, plan.rank).kill()
            if job.again is None:
                seconds = lines.wait_for_survivors(launcher) - killed
            else:
                launcher.wait(PATIENCE)
                lines.read()
                lines.begin_again()
                before = lines.last
                launcher = start_launcher(job.again, output)
                lines.wait_for(before + 1, launcher)
                seconds = lines.times[before + 1] - killed
            lines.wait_for(steps, launcher)
            status = launcher.wait(PATIENCE)
            ended = time.monotonic()
            lines.read()
        except HvdlmError as error:
            raise HvdlmError(f"{error}: {cause_of_failure(log)}") from None
        finally:
            if launcher.poll() is None:
                end_launcher(launcher)
    if status:
        raise HvdlmError(f"the job ended with status {status}: {cause_of_failure(log)}")
    logged, repeated = lines.steps(), lines.repeated
    return Trial(
        rank=plan.rank,
        step=before,
        seconds=seconds,
        steps_repeated=len(repeated),
        samples_repeated=sum(repeated.values()),
        samples_lost=steps * batch_size - sum(step.samples for step in logged.values()),
        seconds_to_end=ended - lines.times[steps],
    ), logged


def _find_rank(job: Job, rank: int) -> psutil.Process:
    """The process of a rank."""
    variables = {name: value.format(rank=rank) for name, value in job.rank_variables.items()}
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended
            if job.word in process.cmdline() and variables.items() <= process.environ().items():
                found.append(process)
    if not found:
        raise HvdlmError(f"rank {rank} of {job.word} is not running")
    return found[-1]
