"""A log of a job's starts, one JSON line for each start and each end, to detect jobs that make no progress.

A start has made progress if the run's newest checkpoint has a higher step at its end than at its beginning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from hvdlm.errors import HvdlmError

# How a start ended: training finished ("done"), stopped to save before the limit ("stopped"), or failed ("failed"); or
# the job received SIGTERM ("told"). After a node failure there is no line.
Ending = Literal["done", "stopped", "failed", "told"]

# A job ends after this many consecutive starts without progress that ended by themselves.
MAX_STARTS_WITHOUT_PROGRESS = 2
# The same, when interrupted starts count too: those ended by a node failure or by preemption, not by the job itself.
MAX_INTERRUPTED_STARTS = 5


def newest_checkpoint_step(run_dir: Path) -> int:
    """The step of the checkpoint from which `--resume latest` would resume, or 0. Does not read the checkpoint."""
    try:
        latest = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8")
    except OSError:
        return 0
    match = re.fullmatch(r"step_(\d+)\n", latest)
    return int(match[1]) if match else 0


def has_ended_early(run_dir: Path, step: int) -> bool:
    """Whether metrics.jsonl says that training has ended after `step`, before train.steps."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    ends = [json.loads(line) for line in lines if '"ended": true' in line and line.endswith("}")]
    return any(end["step"] == step for end in ends)


@dataclass
class Start:
    """One start of a Slurm job; `step`: of the newest checkpoint at its beginning."""

    job: str
    step: int
    ending: Ending | None = None


@dataclass(frozen=True)
class WithoutProgress:
    """How many consecutive starts made no progress: those that ended by themselves, and those that were interrupted."""

    ended: int
    interrupted: int


class StartLog:
    """The starts of all Slurm jobs that have run a job directory, oldest first.

    Raises HvdlmError if the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.starts: list[Start] = []
        for event in self._read():
            if "ending" in event:
                self.starts[-1].ending = event["ending"]
            else:
                self.starts.append(Start(event["job"], event["step"]))

    def begin(self, job: str, step: int) -> None:
        """Logs that the Slurm job with the number `job` starts from the checkpoint of `step`."""
        self.starts.append(Start(job, step))
        self._append({"job": job, "step": step})

    def end(self, ending: Ending) -> None:
        """Logs how the last start ended."""
        self.starts[-1].ending = ending
        self._append({"ending": ending})

    def without_progress(self, job: str, step: int) -> WithoutProgress:
        """Counts the latest starts of `job` that did not get beyond `step`, the step of the newest checkpoint now."""
        own = [start for start in self.starts if start.job == job]
        last = list(takewhile(lambda start: start.step >= step, reversed(own)))
        ended = sum(start.ending in ("stopped", "failed") for start in last)
        return WithoutProgress(ended, len(last) - ended)

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        except OSError as error:
            raise HvdlmError(f"cannot read {self._path}: {error.strerror}") from None
        for line in text.splitlines():
            with suppress(json.JSONDecodeError):  # a node failure may have left an incomplete line
                yield json.loads(line)

    def _append(self, event: dict[str, object]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(event))  # starts a new line, in case the last one is incomplete
        except OSError as error:
            raise HvdlmError(f"cannot write {self._path}: {error.strerror}") from None
