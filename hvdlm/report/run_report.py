"""`hvdlm report`: what runs have measured, side by side. All of it is in their metrics.jsonl and config.toml."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError, write_failure
from hvdlm.model.presets import PRESETS
from hvdlm.report.page import Section, Table, html
from hvdlm.report.palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILION
from hvdlm.report.range_test import advice, smoothed_losses
from hvdlm.training.metrics import FIRST_STEP, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY_BLUE, BLACK)

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run directory, read."""

    name: str
    settings: dict[str, Any]  # by section.key
    train: list[Record]
    validations: list[Record]
    task_scores: list[Record]
    events: list[Record]

    def seconds(self) -> list[float]:
        """Seconds of training at each record of kind train: validations, saves and pauses are not counted."""
        total, step = 0.0, self._start()
        times = []
        for record in self.train:  # step_seconds is a mean over the steps since the record before
            total += record["step_seconds"] * (record["step"] - step)
            step = record["step"]
            times.append(total)
        return times

    def _start(self) -> int:
        """The step that it has begun from: not 0 where it goes on from a checkpoint of another run."""
        first = next((each["step"] - 1 for each in self.events if str(each["message"]).startswith(FIRST_STEP)), 0)
        return min(first, self.train[0]["step"] - 1) if self.train else 0


def write_report(run_dirs: Sequence[Path], output: Path | None) -> int:
    """Writes one HTML page of some runs; `output`: None: report.html in the first one. Returns the exit status.

    Raises HvdlmError if a directory holds no run, or if the page cannot be written.
    """
    runs = [_read(path) for path in dict.fromkeys(run_dirs)]
    page = output or run_dirs[0] / "report.html"
    names = ", ".join(run.name for run in runs)
    try:
        page.write_text(html(f"hvdlm: {names}", _LEAD, _sections(runs)), encoding="utf-8")
    except OSError as error:
        raise HvdlmError(f"cannot write {page}: {write_failure(error)}") from None
    print(f"{page}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
    return 0


_LEAD = (
    "Losses in nats per token. Seconds are those of training, without validations, saves and pauses. Times of a step "
    "are means since the line before, each of the rank for which it is the longest."
)


def _read(path: Path) -> Run:
    file = path / "metrics.jsonl"
    if not file.exists():
        raise HvdlmError(f"{path} holds no metrics.jsonl: give the directory of a run, its train.run_dir")
    try:
        records = read_metrics(file)
        by_kind = {
            kind: [each for each in records if each["kind"] == kind] for kind in ("train", "eval", "tasks", "event")
        }
        settings = load(path / "config.toml", [], PRESETS).model_dump()
    except OSError as error:
        raise HvdlmError(f"cannot read {file}: {error.strerror}") from None
    except (UnicodeDecodeError, KeyError, TypeError):
        raise HvdlmError(f"{file} is not the metrics.jsonl of a run") from None
    flat = {f"{section}.{key}": value for section, values in settings.items() for key, value in values.items()}
    return Run(str(path), flat, *by_kind.values())


def _sections(runs: Sequence[Run]) -> Sequence[Section]:
    sections = [Section("Runs", "", table=_summary(runs))]
    if len(runs) > 1:
        sections.append(Section("Settings that differ", "All others are equal.", table=_differences(runs)))
    pictures: tuple[tuple[str, str, Callable[[Axes, Run, str], None]], ...] = (
        ("Loss over tokens", "Line: of each logged step's batch. Dots: validation.", _loss_over_tokens),
        ("Validation loss over seconds", "What a user waits for.", _loss_over_seconds),
        ("Tokens per second", "Of all ranks together, on the slowest rank's clock.", _speed),
        ("Share of communication", "Of a step: seconds waited for other ranks, which no computation hid.", _waiting),
        ("Gradient norm", "Before clipping.", _norm),
        ("Learning rate", "", _rate),
    )
    sections += [Section(title, text, _draw(runs, draw)) for title, text, draw in pictures]
    if tests := [run for run in runs if run.settings["optimizer.schedule"] == "range_test"]:
        text = " ".join(f"{run.name}: {advice(run.train)}" for run in tests)
        sections.append(Section("Loss over learning rate", f"Smoothed. {text}", _draw(tests, _loss_over_rate)))
    if any(run.task_scores for run in runs):
        sections.append(Section("Scores in tasks", "Of lm-evaluation-harness.", table=_task_scores(runs)))
    sections.append(Section("Events", "", table=_events(runs)))
    return sections


def _summary(runs: Sequence[Run]) -> Table:
    measured = ("steps", "ranks", "tokens", "loss", "validation loss", "best", "tokens/s", "communication", "MB a step")
    return Table(("run", *measured), [[run.name, *_measured(run)] for run in runs])


def _measured(run: Run) -> list[str]:
    steps = run.settings["train.steps"]
    if not run.train:
        return [f"0 of {steps:,}", *[""] * 8]
    last = run.train[-1]
    losses = {each["step"]: each["loss"] for each in run.validations if each["loss"] is not None}
    best = min(losses, key=lambda step: losses[step], default=0)
    return [
        f"{last['step']:,} of {steps:,}",
        str(last["world_size"]),
        f"{last['tokens']:,}",
        "" if last["loss"] is None else f"{last['loss']:.4f}",
        f"{list(losses.values())[-1]:.4f}" if losses else "",
        f"{losses[best]:.4f} (step {best})" if losses else "",
        f"{statistics.median(each['tokens_per_second'] for each in run.train):,.0f}",
        f"{statistics.fmean(map(_communication, run.train)):.1%}",
        f"{statistics.fmean(each['wire_bytes'] for each in run.train) / 1e6:,.2f}",
    ]


def _differences(runs: Sequence[Run]) -> Table:
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [[key, *(str(run.settings.get(key, "")) for run in runs)] for key in keys]
    return Table(["setting", *(run.name for run in runs)], [row for row in rows if len(set(row[1:])) > 1])


def _events(runs: Sequence[Run]) -> Table:
    return Table(
        ("run", "step", "message"),
        [[run.name, f"{each['step']:,}", str(each["message"])] for run in runs for each in run.events],
    )


def _task_scores(runs: Sequence[Run]) -> Table:
    records = [(run.name, each) for run in runs for each in run.task_scores]
    names = list(dict.fromkeys(name for _, each in records for name in each if name not in ("kind", "step")))
    rows = [[run, f"{each['step']:,}", *map(_score, map(each.get, names))] for run, each in records]
    return Table(("run", "step", *names), rows)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _communication(record: Record) -> float:
    return float(record["exposed_comm_seconds"] / record["step_seconds"])


def _loss_over_tokens(axes: Axes, run: Run, colour: str) -> None:
    _plot(axes, [(each["tokens"], each["loss"]) for each in run.train], colour, run.name, linewidth=0.8)
    _plot(axes, [(each["tokens"], each["loss"]) for each in run.validations], colour, None, marker="o", linestyle="")
    axes.set(xlabel="tokens", ylabel="nats per token")


def _loss_over_seconds(axes: Axes, run: Run, colour: str) -> None:
    if not run.train:
        return
    times = np.interp([each["step"] for each in run.validations], [each["step"] for each in run.train], run.seconds())
    points = [(second, each["loss"]) for second, each in zip(times.tolist(), run.validations, strict=True)]
    _plot(axes, points, colour, run.name, marker="o")
    axes.set(xlabel="seconds", ylabel="nats per token")


def _loss_over_rate(axes: Axes, run: Run, colour: str) -> None:
    points = smoothed_losses(run.train)
    _plot(axes, points, colour, run.name)
    axes.set(xlabel="learning rate", ylabel="nats per token", xscale="log")
    if points:  # what follows a loss that has diverged would flatten all else
        least, first = min(loss for _, loss in points), points[0][1]
        axes.set_ylim(least - 0.1 * (first - least), first + 0.5 * (first - least))


def _speed(axes: Axes, run: Run, colour: str) -> None:
    _plot(axes, [(each["step"], each["tokens_per_second"]) for each in run.train], colour, run.name)
    axes.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))


def _waiting(axes: Axes, run: Run, colour: str) -> None:
    _plot(axes, [(each["step"], _communication(each)) for each in run.train], colour, run.name)
    axes.set(xlabel="step", ylabel="share of a step", ylim=(0, 1))


def _norm(axes: Axes, run: Run, colour: str) -> None:
    _plot(axes, [(each["step"], each["grad_norm"] or None) for each in run.train], colour, run.name)
    axes.set(xlabel="step", ylabel="norm", yscale="log")


def _rate(axes: Axes, run: Run, colour: str) -> None:
    _plot(axes, [(each["step"], each["lr"]) for each in run.train], colour, run.name)
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))


def _plot(
    axes: Axes, points: Sequence[tuple[float, float | None]], colour: str, label: str | None, **style: Any
) -> None:
    """Points without a number are left out: it was not finite, or not measured."""
    finite = [(x, y) for x, y in points if y is not None]
    if finite:
        axes.plot(*zip(*finite, strict=True), color=colour, label=label and f" {label}".replace("$", r"\$"), **style)


def _draw(runs: Sequence[Run], draw: Callable[[Axes, Run, str], None]) -> str:
    """A figure as an <svg> element."""
    from matplotlib import rc_context  # here: it takes 0.4 s
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for number, run in enumerate(runs):
        draw(axes, run, _COLOURS[number % len(_COLOURS)])
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "hvdlm", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    content = text.getvalue()
    return content[content.index("<svg") :]
