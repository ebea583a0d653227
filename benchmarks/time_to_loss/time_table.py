"""The results of time_to_loss.py: a table and a picture of validation loss over seconds, by set-up."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.methods import parse_method
from common.plots import save_png
from common.results import format_number, markdown_table
from hvdlm.report.palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILION
from time_to_loss.trained import DENSE, Trained, excess_percent, length_needed, mean_curve

_COLUMNS = (
    "",
    "learning rate",
    "loss over dense, %",
    "of limit",
    "steps needed",
    "seconds over limit",
)
_COLOURS = (BLACK, BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY_BLUE)
_STYLES = ("-", "--", ":")


@dataclass(frozen=True)
class Row:
    """A system on one set-up; benchmarks/README.md defines each column."""

    name: str
    rate: float
    excess_mean: float
    excess_deviation: float | None  # None: one seed
    of_limit: float
    step_seconds: float
    length_needed: float | None
    seconds_over_limit: float | None


def make_rows(
    trained: Sequence[Trained], rates: Mapping[str, float], speeds: Mapping[str, tuple[str, float, float]]
) -> list[Row]:
    """`speeds`: by name, the method whose curve a system has, its speed over the limit's, and the seconds of a step."""
    rows = []
    for name, (method, of_limit, seconds) in speeds.items():
        excess, needed = excess_percent(trained, method), length_needed(trained, method)
        rows.append(
            Row(
                name=name,
                rate=rates[method],
                excess_mean=statistics.fmean(excess),
                excess_deviation=statistics.stdev(excess) if len(excess) > 1 else None,
                of_limit=of_limit,
                step_seconds=seconds,
                length_needed=needed,
                seconds_over_limit=None if needed is None else needed / of_limit,
            )
        )
    return rows


def table(results: Mapping[str, Any]) -> str:
    """Markdown of what is in time_to_loss.json: a table for each set-up."""
    parts = []
    for name, result in results["setups"].items():
        rows = [_cells(Row(**row)) for row in result["rows"]]
        parts.append(f"## {name}\n\n{markdown_table(_COLUMNS, rows)}")
    return "\n".join(parts)


def draw(trained: Sequence[Trained], results: Mapping[str, Any], tokens_per_step: int, path: Path) -> None:
    """Writes a PNG with a panel for each set-up: validation loss over seconds, the mean over seeds."""
    setups = results["setups"]
    figure = Figure(figsize=(2 + 4 * len(setups), 4.2), layout="constrained")
    panels = figure.subplots(1, len(setups), sharey=True, squeeze=False)[0]
    for panel, (name, result) in zip(panels, setups.items(), strict=True):
        for index, row in enumerate(Row(**row) for row in result["rows"]):
            method = result["methods"][row.name]
            if row.name != method and row.name != parse_method(method).name:
                continue  # a peer, whose curve over tokens is another's
            curve = mean_curve(trained, method)
            seconds = [tokens / tokens_per_step * row.step_seconds for tokens, _ in curve]
            style = _STYLES[index // len(_COLOURS) % len(_STYLES)]
            panel.plot(
                seconds, [loss for _, loss in curve], style, color=_COLOURS[index % len(_COLOURS)], label=row.name
            )
        target = mean_curve(trained, DENSE)[-1][1]
        panel.axhline(target, color="grey", linewidth=0.6)
        panel.set(title=name, xlabel="seconds of training", xscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend(fontsize=7)
    save_png(figure, path)


def _cells(row: Row) -> list[str]:
    deviation = "" if row.excess_deviation is None else f" ± {row.excess_deviation:.2f}"
    return [
        row.name,
        f"{row.rate:g}",
        f"{row.excess_mean:+.2f}{deviation}",
        f"{row.of_limit:.3f}",
        format_number(row.length_needed, "{:.2f}") or "not reached",
        format_number(row.seconds_over_limit, "{:.2f}"),
    ]
