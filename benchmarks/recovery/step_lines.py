"""The steps that a job has logged, read while it trains."""

from __future__ import annotations

import json
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError

# Seconds for which a job is waited for: to come to a step, and to end
PATIENCE = 300.0
_POLL = 0.002


@dataclass(frozen=True)
class LoggedStep:
    """A step of which a line is there."""

    loss: float | None  # the mean over the samples that entered it; None: not all ranks have logged theirs
    samples: int  # that entered it


class Lines:
    """What a job has logged so far. `read` looks once; the others wait."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}  # time.monotonic() at which a step was first seen
        self.since_death: float | None = None  # the same of the first step without the dead rank
        self.repeated: dict[int, int] = {}  # samples of steps that had ended, and were trained on again

    def read(self) -> None:
        """Reads what is new."""
        raise NotImplementedError

    def steps(self) -> dict[int, LoggedStep]:
        """The steps of the run by number, each as it was made at last."""
        raise NotImplementedError

    def begin_again(self) -> None:
        """The job goes on from its newest checkpoint."""
        raise NotImplementedError

    @property
    def last(self) -> int:
        """The last step that was seen."""
        return max(self.times, default=0)

    def wait_for_survivors(self, job: subprocess.Popen[bytes]) -> float:
        """Until the first step without the dead rank has ended; returns when that was."""
        while self.since_death is None:
            self.wait_for(self.last + 1, job)
        return self.since_death

    def wait_for(self, step: int, job: subprocess.Popen[bytes]) -> None:
        """Until the step has ended. Raises HvdlmError if the job ends before, or after `PATIENCE`."""
        end = time.monotonic() + PATIENCE
        while self.last < step:
            if job.poll() is not None and (self.read() or self.last < step):
                raise HvdlmError(f"the job ended with status {job.returncode} at step {self.last}, before step {step}")
            if time.monotonic() > end:
                raise HvdlmError(f"step {step} has not ended within {PATIENCE:g} s")
            time.sleep(_POLL)
            self.read()


class MetricsLines(Lines):
    """metrics.jsonl of `hvdlm train`, whose every step has the whole global batch."""

    def __init__(self, run_dir: Path, batch_size: int) -> None:
        super().__init__()
        self._run_dir, self._batch_size = run_dir, batch_size
        self._path = run_dir / "metrics.jsonl"
        self._version: tuple[int, int] | None = None
        self._losses: dict[int, float] = {}

    def read(self) -> None:
        """Lines may have been dropped, and written again: reads the file as a whole if it has changed."""
        if not self._path.exists():
            return
        state = self._path.stat()
        now, version, has_died = time.monotonic(), (state.st_size, state.st_mtime_ns), False
        if version == self._version:
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                return
            has_died |= record["kind"] == "event" and " died: " in record["message"]
            if record["kind"] == "train":
                if has_died and self.since_death is None:
                    self.since_death = now
                self._losses[record["step"]] = record["loss"]
                self.times.setdefault(record["step"], now)
        self._version = version

    def steps(self) -> dict[int, LoggedStep]:
        return {step: LoggedStep(loss, self._batch_size) for step, loss in self._losses.items()}

    def begin_again(self) -> None:
        saved = [int(each.name.removeprefix("step_")) for each in self._run_dir.glob("checkpoints/step_" + "[0-9]" * 8)]
        newest = max((step for step in saved if step <= self.last), default=0)
        self.repeated = dict.fromkeys(range(newest + 1, self.last + 1), self._batch_size)


class RankLines(Lines):
    """The files of a peer's ranks, rank*.jsonl: lines of peer_training.Step."""

    def __init__(self, run_dir: Path, ranks: int) -> None:
        super().__init__()
        self._run_dir, self._ranks = run_dir, ranks
        self._read_to: dict[Path, int] = defaultdict(int)  # bytes of each file
        # Lines of a step by the number of ranks that made it: several, if it was made again when a rank had died
        self._lines: dict[int, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))

    def read(self) -> None:
        """Files only grow: reads their new lines."""
        now = time.monotonic()
        for path in sorted(self._run_dir.glob("rank*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read_to[path])
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._read_to[path] += len(whole) + 1
                for line in whole.splitlines():
                    self._add(json.loads(line), now)

    def _add(self, line: dict[str, Any], now: float) -> None:
        step, ranks = line["step"], line["ranks"]
        made = self._lines[step]
        made[ranks].append(line)
        self.times.setdefault(step, now)
        if len(made) > 1:
            self.repeated[step] = made[max(made)][0]["samples"]
        elif ranks < self._ranks and self.since_death is None:
            self.since_death = now

    def steps(self) -> dict[int, LoggedStep]:
        return {step: _combined(made[min(made)], min(made)) for step, made in self._lines.items()}


def _combined(lines: list[dict[str, Any]], ranks: int) -> LoggedStep:
    """A step from the lines of those of its `ranks` that lived to log it."""
    entered = [line for line in lines if line["own_samples"]]
    weights = [line["own_samples"] for line in entered]
    loss = sum(line["loss"] * weight for line, weight in zip(entered, weights, strict=True)) / max(sum(weights), 1)
    return LoggedStep(loss if len(entered) == ranks else None, lines[0]["samples"])
