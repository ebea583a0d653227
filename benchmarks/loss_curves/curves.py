"""What a convergence study leaves beside its points: a table of the final losses, and a picture of the curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loss_curves.runs import Point, Run

DENSE = "none"

# By Okabe and Ito: told apart by the colour-blind. Yellow is left out, which paper swallows.
_COLOURS = ("black", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_STYLES = ("-", "--", ":")


def final_losses(runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    """The last validation loss by variant and seed."""
    losses: dict[str, dict[int, float]] = {}
    for run in runs:
        losses.setdefault(run.variant, {})[run.seed] = run.points[-1].loss
    return losses


def worse_than_dense(losses: dict[str, dict[int, float]], variant: str) -> list[float]:
    """Percent by which a variant's loss is above the dense one's of the same seed, by seed."""
    dense = losses.get(DENSE, {})
    return [100 * (loss / dense[seed] - 1) for seed, loss in losses[variant].items() if seed in dense]


def table(runs: Sequence[Run]) -> str:
    """Markdown: means over seeds, and their standard deviation where there are several."""
    losses = final_losses(runs)
    lines = ["| | seeds | validation loss | over dense, % | wire MB | seconds |", "|---|---|---|---|---|---|"]
    for variant, by_seed in losses.items():
        own = [run for run in runs if run.variant == variant]
        cells = [
            variant,
            str(len(by_seed)),
            _with_spread(list(by_seed.values()), "{:.4f}"),
            _with_spread(worse_than_dense(losses, variant), "{:+.2f}"),
            f"{statistics.fmean(run.wire_bytes for run in own) / 1e6:.3f}",
            f"{statistics.fmean(run.points[-1].seconds for run in own):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Writes a PNG: validation loss over tokens and over seconds; lines are means over seeds, bands their range."""
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
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=200)


def _draw_curve(
    axes: Axes, curves: Sequence[Sequence[Point]], over_seconds: bool, label: str, colour: str, style: str
) -> None:
    rows = list(zip(*curves, strict=True))  # one a validation: the points of all seeds
    across = [statistics.fmean(point.seconds if over_seconds else point.tokens for point in row) for row in rows]
    losses = [[point.loss for point in row] for row in rows]
    axes.plot(across, [statistics.fmean(row) for row in losses], style, color=colour, linewidth=1.2, label=label)
    axes.fill_between(across, [min(row) for row in losses], [max(row) for row in losses], color=colour, alpha=0.15)


def _with_spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values)).lstrip('+')}" if len(values) > 1 else mean
