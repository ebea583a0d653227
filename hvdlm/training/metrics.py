"""metrics.jsonl: what a run has measured, one JSON object a line. Console and pictures are views of this file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm.training.console import View


class MetricsLog:
    """Appends records to `metrics.jsonl` in the run directory, and shows them. Rank 0 has one."""

    def __init__(self, run_dir: Path, start: int, view: View) -> None:
        """`start`: the step a resumed run goes on from; later lines, of steps that are run again, are dropped."""
        self._path = run_dir / "metrics.jsonl"
        if self._path.exists():
            _drop_after(self._path, start)
        # Unbuffered: close() must not raise the error of a full disk again
        self._file = self._path.open("ab", buffering=0)
        self._view = view

    def write(self, kind: str, step: int, **values: Any) -> None:
        """`kind`: "train", "eval" or "event"; numbers that are not finite become null, as JSON has none."""
        record = {"kind": kind, "step": step, **{name: _finite(value) for name, value in values.items()}}
        line = json.dumps(record).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise self._write_error(error.strerror) from error
        if written != len(line):
            raise self._write_error("only a part of the line fits")
        self._view.show(record)

    def _write_error(self, reason: str | None) -> HvdlmError:
        return HvdlmError(f"cannot write {self._path}: {reason}; make room, then go on with --resume latest")

    def close(self) -> None:
        """Makes the file durable and ends the view."""
        self._view.close()
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a crash cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, step: int) -> None:
    kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
