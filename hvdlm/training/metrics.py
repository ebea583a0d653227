"""metrics.jsonl: what a run has measured, one JSON object a line. Console and pictures are views of this file."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError, write_failure
from hvdlm.training.console import View

logger = logging.getLogger(__name__)

FIRST_STEP = "first step done"  # with what the event of a run's, or a resumed run's, first step begins


class MetricsLog:
    """Appends records to `metrics.jsonl` in the run directory, and shows them. Rank 0 has one."""

    def __init__(self, run_dir: Path, start: int, view: View) -> None:
        """`start`: the step a resumed run goes on from; later lines, of steps that are run again, are dropped."""
        self._path = run_dir / "metrics.jsonl"
        self._view = view
        try:
            kept = _drop_after(self._path, start) if self._path.exists() else []
            # Unbuffered: close() must not raise the error of a full disk again
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise self._write_error(write_failure(error)) from error
        self._held = {(record["kind"], record["step"]) for record in kept}
        self.losses = {record["step"]: record["loss"] for record in kept if _is_validation(record)}

    def holds(self, kind: str, step: int) -> bool:
        """Whether there is a record of that kind of a step."""
        return (kind, step) in self._held

    def write(self, kind: str, step: int, **values: Any) -> None:
        """`kind`: "train", "eval", "tasks" or "event"; numbers that are not finite become null, as JSON has none.

        A second record of a step and a kind other than "event" is left out: after a rank has died, others may not know
        that the first was written.
        """
        if kind != "event" and self.holds(kind, step):
            return
        record = {"kind": kind, "step": step, **{name: _finite(value) for name, value in values.items()}}
        line = json.dumps(record).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._write_error(write_failure(error)) from error
        if written != len(line):
            raise self._write_error("only a part of the line fits; make room")
        self._held.add((kind, step))
        if _is_validation(record):
            self.losses[step] = record["loss"]
        self._view.show(record)

    def _write_error(self, reason: str) -> HvdlmError:
        return HvdlmError(f"cannot write {self._path}: {reason}, then go on with --resume latest")

    def close(self) -> None:
        """Makes the file durable and ends the view. A failure is a warning: every line has been written before."""
        self._view.close()
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            logger.warning("%s may be lost if this machine crashes now: %s", self._path, error.strerror)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a crash cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _is_validation(record: dict[str, Any]) -> bool:
    return record["kind"] == "eval" and record["loss"] is not None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Leaves only the records up to a step in the file, and returns them."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    partial.replace(path)
    return kept
