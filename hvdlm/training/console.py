"""What a run shows on the console: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class View(Protocol):
    """Shows records of metrics.jsonl as they are written."""

    def show(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Views:
    """Several views of one run."""

    def __init__(self, *views: View) -> None:
        self._views = views

    def show(self, record: dict[str, Any]) -> None:
        for view in self._views:
            view.show(record)

    def close(self) -> None:
        for view in self._views:
            view.close()


def open_view(steps: int, start: int) -> View:
    """The view that suits where stderr goes; the run goes from step `start` to `steps`."""
    return ProgressLine(steps, start) if sys.stderr.isatty() else Lines(steps)


class Lines:
    """Plain lines, for log files."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def show(self, record: dict[str, Any]) -> None:
        print(_sentence(record, self._steps), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class ProgressLine:
    """A live line at the bottom of a terminal; validations and events scroll by above it."""

    def __init__(self, steps: int, start: int) -> None:
        self._steps = steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=Console(stderr=True),
        )
        self._task: TaskID = self._progress.add_task("training", total=steps, completed=start, numbers="")
        self._progress.start()

    def show(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            self._progress.update(self._task, completed=record["step"], numbers=_sentence(record, self._steps))
        else:
            self._progress.console.print(
                _sentence(record, self._steps), highlight=False, markup=False, emoji=False, soft_wrap=True
            )

    def close(self) -> None:
        self._progress.stop()


def _sentence(record: dict[str, Any], steps: int) -> str:
    step = f"step {record['step']}/{steps}"
    if record["kind"] == "event":
        return f"{step}  {record['message']}"
    if record["kind"] == "tasks":
        scores = (f"{name} {value:.4f}" for name, value in record.items() if isinstance(value, float))
        return f"{step}  {'  '.join(scores)}"
    is_validation = record["kind"] == "eval"
    value = record["loss" if is_validation else "mean_loss"]
    loss = "nan" if value is None else f"{value:.4f}"
    if is_validation:
        return f"{step}  validation loss {loss}"
    share = record["exposed_comm_seconds"] / record["step_seconds"]
    left = (steps - record["step"]) * record["step_seconds"]
    return (
        f"{step}  loss {loss}  {record['tokens_per_second']:,.0f} tokens/s  communication {share:.0%}  "
        f"{int(left // 60)}:{int(left % 60):02d} left"
    )
