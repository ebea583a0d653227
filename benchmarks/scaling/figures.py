"""The figures of a report, with markers and hatches beside colours, so that they can be read in black and white."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hvdlm.comm.rate import rate_text
from hvdlm.report.palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILION, YELLOW
from hvdlm.scaling.holdout import Holdout
from scaling.efficiency import PARTS, Summary, groups, links, with_link

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY_BLUE, BLACK, YELLOW)
_MARKERS = "osD^vPX*"
_LINES = ("-", "--", ":")  # where there are more lines than colours
_HATCHES = ("", "//", "..", "xx")


def throughput(summaries: Sequence[Summary]) -> Figure:
    """Tokens/s over ranks, with the ideal line and 95% intervals."""

    def draw(axes: Axes, own: Sequence[Summary]) -> None:
        base = min(own, key=lambda s: (s.point.ranks, s.point.codec != "none"))
        ranks = sorted({s.point.ranks for s in own})
        each = base.tokens_per_second.mean / base.point.ranks
        axes.plot(ranks, [each * count for count in ranks], color="0.6", linestyle="--", label="ideal")
        for index, (codec, line) in enumerate(_by_codec(own)):
            speeds = [s.tokens_per_second for s in line]
            below = [max(0.0, speed.mean - speed.low) for speed in speeds]
            above = [max(0.0, speed.high - speed.mean) for speed in speeds]
            means = [speed.mean for speed in speeds]
            axes.errorbar([s.point.ranks for s in line], means, [below, above], capsize=3, label=codec, **_style(index))
        axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="tokens/s")
        _tick_ranks(axes, ranks)

    return _panels(summaries, draw)


def efficiency(summaries: Sequence[Summary]) -> Figure:
    """Efficiency over ranks, in percent."""

    def draw(axes: Axes, own: Sequence[Summary]) -> None:
        for index, (codec, line) in enumerate(_by_codec(own)):
            known = [s for s in line if s.efficiency is not None]
            values = [100 * (s.efficiency or 0.0) for s in known]
            axes.plot([s.point.ranks for s in known], values, label=codec, **_style(index))
        axes.axhline(100, color="0.6", linestyle="--", label="ideal")
        axes.set(xscale="log", xlabel="ranks", ylabel="efficiency, %", ylim=(0, 110))
        _tick_ranks(axes, sorted({s.point.ranks for s in own}))

    return _panels(summaries, draw)


def time_per_step(summaries: Sequence[Summary]) -> Figure:
    """The parts of a step in milliseconds, as stacked bars, by codec and ranks."""

    def draw(axes: Axes, unsorted: Sequence[Summary]) -> None:
        own = sorted(unsorted, key=lambda s: (s.point.codec, s.point.ranks))
        below = [0.0] * len(own)
        for index, part in enumerate(PARTS):
            heights = [1e3 * s.parts[part] for s in own]
            look = {"color": _COLOURS[index], "hatch": _HATCHES[index], "edgecolor": "white", "linewidth": 0}
            axes.bar(range(len(own)), heights, bottom=below, label=part, **look)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        names = [f"{s.point.codec} {s.point.ranks}" for s in own]
        axes.set_xticks(range(len(own)), names, rotation=90, fontsize=7)
        axes.set(ylabel="ms per step", xlabel="codec and ranks")

    return _panels(summaries, draw, width=6.5)


def bus_bandwidth(results: Sequence[Mapping[str, Any]], line_rates: Sequence[float | None]) -> Figure:
    """Bus bandwidth of each implementation of all-reduce over the size, with the rate of the link.

    One panel per file of allreduce.py.
    """
    figure = Figure(figsize=(6.5 * len(results), 4.6), layout="constrained")
    all_axes = figure.subplots(1, len(results), squeeze=False)
    for axes, result, line_rate in zip(all_axes[0], results, line_rates, strict=True):
        rows = [row for row in result["rows"] if row["dtype"] == "float32"]
        for index, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
            own = [row for row in rows if row["way"] == way]
            sizes, speeds = [row["nbytes"] for row in own], [row["bus_bandwidth"] / 1e9 for row in own]
            axes.plot(sizes, speeds, label=way, **_style(index))
        if line_rate is not None:
            axes.axhline(line_rate / 8e9, color="0.6", linestyle="--", label="rate of the link")
        axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="bus bandwidth, GB/s")
        hosts = len(set(result["hosts"]))
        axes.set_title(f"{result['ranks']} ranks on {hosts} host{'s' * (hosts > 1)}", fontsize=10)
        axes.legend(fontsize=7, frameon=False)
    return figure


def loss_over_time(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation loss over seconds of training by codec, for the first seed of convergence.py."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    seed = min(run["seed"] for run in runs)
    for index, run in enumerate(run for run in runs if run["seed"] == seed):
        points = run["points"]
        style = {**_style(index), "markersize": 3}
        axes.plot([p["seconds"] for p in points], [p["loss"] for p in points], label=run["variant"], **style)
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats per token")
    axes.legend(fontsize=7, frameon=False)
    return figure


def predictions(holdouts: Sequence[Holdout]) -> Figure:
    """Predicted over measured milliseconds per step of held-out points, and the errors."""
    figure = Figure(figsize=(6.5, 7), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(2, 1))
    extremes: list[float] = []
    for index, holdout in enumerate(holdouts):
        style = {**_style(index), "linestyle": "none"}
        measured = [1e3 * each.measured for each in holdout.residuals]
        predicted = [1e3 * each.predicted for each in holdout.residuals]
        extremes += measured + predicted
        above.plot(measured, predicted, label=f"{holdout.name}, MAPE {holdout.mape:.1%}", **style)
        below.plot(measured, [100 * each.error for each in holdout.residuals], **style)
    bounds = [min(extremes), max(extremes)]
    above.plot(bounds, bounds, color="0.6", linestyle="--")
    below.axhline(0, color="0.6", linestyle="--")
    above.set(xscale="log", yscale="log", ylabel="predicted, ms per step")
    below.set(xscale="log", xlabel="measured, ms per step", ylabel="error, %")
    above.legend(fontsize=7, frameon=False)
    return figure


def save(figure: Figure, stem: Path) -> str:
    """Writes STEM.png and STEM.svg; returns the <svg> element."""
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    text = stem.with_suffix(".svg").read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def _panels(
    summaries: Sequence[Summary], draw: Callable[[Axes, Sequence[Summary]], None], width: float = 4.6
) -> Figure:
    """One panel per link (columns), and per model and batch size (rows)."""
    rates, rows = links(summaries), groups(summaries)
    figure = Figure(figsize=(width * len(rates), 4.2 * len(rows)), layout="constrained")
    all_axes = figure.subplots(len(rows), len(rates), squeeze=False)
    for row, (title, own) in zip(all_axes, rows.items(), strict=True):
        for axes, rate in zip(row, rates, strict=True):
            draw(axes, with_link(rate, own))
            link = [] if rate is None else [f"links of {rate_text(int(rate))}"]
            axes.set_title("; ".join([*link, *([title] if len(rows) > 1 else [])]), fontsize=10)
            axes.grid(alpha=0.25, linewidth=0.5)
    all_axes[0][0].legend(fontsize=7, frameon=False)
    return figure


def _by_codec(summaries: Sequence[Summary]) -> list[tuple[str, list[Summary]]]:
    codecs = sorted({s.point.codec for s in summaries})
    return [(codec, [s for s in summaries if s.point.codec == codec]) for codec in codecs]


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index // len(_COLOURS) % len(_LINES)],
        "markersize": 4,
        "linewidth": 1.2,
    }


def _tick_ranks(axes: Axes, ranks: Sequence[int]) -> None:
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.minorticks_off()
