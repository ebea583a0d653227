"""Does a job that puts itself back into the queue get anywhere? Kept in a file of its own, one line an event.

The measure is the step of the run's newest checkpoint. A start that has not raised it was in vain.
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

# A start ends by itself ("stopped" to save, "failed"), or somebody ended it with a signal ("told"); one that its node
# took with it leaves no line.
Ending = Literal["done", "stopped", "failed", "told"]

# Starts in a row, in vain, after which a job ends.
MOST_IN_VAIN = 2
# The same with those that were cut short from outside: by a node's failure or by preemption, which are not the job's
# fault, but no reason to try for ever.
MOST_CUT_SHORT = 5


def newest_step(run_dir: Path) -> int:
    """The step of the checkpoint that `--resume latest` would begin with, or 0. Does not read the checkpoint itself."""
    try:
        latest = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8")
    except OSError:
        return 0
    match = re.fullmatch(r"step_(\d+)\n", latest)
    return int(match[1]) if match else 0


@dataclass
class Start:
    """One start of a Slurm job; `step`: of the newest checkpoint when it began."""

    job: str
    step: int
    ending: Ending | None = None


@dataclass(frozen=True)
class InVain:
    """How many starts in a row have not raised the newest checkpoint: by themselves, or cut short from outside."""

    by_themselves: int
    cut_short: int


class Record:
    """The starts of all Slurm jobs that have run a job directory, oldest first.

    Raises HvdlmError where it cannot be read or written.
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
        """Notes that the Slurm job with the number `job` starts, from a checkpoint of `step`."""
        self.starts.append(Start(job, step))
        self._append({"job": job, "step": step})

    def end(self, ending: Ending) -> None:
        """Notes how the last start ended."""
        self.starts[-1].ending = ending
        self._append({"ending": ending})

    def in_vain(self, job: str, step: int) -> InVain:
        """Counts the last starts of this job that began with a checkpoint of `step`, the newest now, or later."""
        own = [start for start in self.starts if start.job == job]
        last = list(takewhile(lambda start: start.step >= step, reversed(own)))
        by_themselves = sum(start.ending in ("stopped", "failed") for start in last)
        return InVain(by_themselves, len(last) - by_themselves)

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        except OSError as error:
            raise HvdlmError(f"cannot read {self._path}: {error.strerror}") from None
        for line in text.splitlines():
            with suppress(json.JSONDecodeError):  # a line that a node's failure left unfinished
                yield json.loads(line)

    def _append(self, event: dict[str, object]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(event))  # what a node's failure left unfinished must not swallow it
        except OSError as error:
            raise HvdlmError(f"cannot write {self._path}: {error.strerror}") from None
