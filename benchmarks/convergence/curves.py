"""The results of a convergence study: a table of the last losses, and a plot of the loss curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.plots import save_png
from common.results import markdown_table
from convergence.runs import Point, Run
from hvdlm.report.palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILION

DENSE = "none"

_COLOURS = (BLACK, BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY_BLUE)  # yellow is hard to see on white
_STYLES = ("-", "--", ":")

_COLUMNS = ("", "seeds", "validation loss", "over dense, %", "wire MB", "seconds")


def final_losses(runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    """The last validation loss by variant and seed."""
    losses: dict[str, dict[int, float]] = {}
    for run in runs:
        losses.setdefault(run.variant, {})[run.seed] = run.points[-1].loss
    return losses


def percent_over_dense(losses: dict[str, dict[int, float]], variant: str) -> list[float]:
    """By how many percent a variant's loss exceeds that of codec none with the same seed, by seed."""
    dense = losses.get(DENSE, {})
    return [100 * (loss / dense[seed] - 1) for seed, loss in losses[variant].items() if seed in dense]


def table(runs: Sequence[Run]) -> str:
    """Markdown: means over seeds, with the standard deviation where there are several seeds."""
    losses = final_losses(runs)
    rows = []
    for variant, by_seed in losses.items():
        own = [run for run in runs if run.variant == variant]
        rows.append(
            [
                variant,
                str(len(by_seed)),
                _mean_and_deviation(list(by_seed.values()), "{:.4f}"),
                _mean_and_deviation(percent_over_dense(losses, variant), "{:+.2f}"),
                f"{statistics.fmean(run.wire_bytes for run in own) / 1e6:.3f}",
                f"{statistics.fmean(run.points[-1].seconds for run in own):.1f}",
            ]
        )
    return markdown_table(_COLUMNS, rows)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes a PNG: validation loss over tokens and over seconds. Lines are means over seeds, bands their range."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    variants = list(dict.fromkeys(run.variant for run in runs))
    for index, variant in enumerate(variants):
        curves = [run.points for run in runs if run.variant == variant]
        style = _STYLES[index // len(_COLOURS) % len(_STYLES)]
        for axes in (left, right):
            _draw_curve(axes, curves, axes is right, variant, _COLOURS[index % len(_COLOURS)], style)
    left.set(xlabel="tokens", ylabel="validation loss (nats per token)")
    right.set(xlabel="seconds of training")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_png(figure, path)


def _draw_curve(
    axes: Axes, curves: Sequence[Sequence[Point]], over_seconds: bool, label: str, colour: str, style: str
) -> None:
    validations = list(zip(*curves, strict=True))  # of each, the points of all seeds
    x = [statistics.fmean(point.seconds if over_seconds else point.tokens for point in each) for each in validations]
    losses = [[point.loss for point in each] for each in validations]
    axes.plot(x, [statistics.fmean(each) for each in losses], style, color=colour, linewidth=1.2, label=label)
    axes.fill_between(x, [min(each) for each in losses], [max(each) for each in losses], color=colour, alpha=0.15)


def _mean_and_deviation(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else mean
