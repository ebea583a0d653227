"""The picture of a comparison: how near each contestant comes to the limit, by set-up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from comparison.lineup import LIMIT, is_ours

_PANELS_A_ROW = 4
_RIGHT = 1.25  # end of the axis, a little over the limit's 1
_PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # behind a number

# By Okabe and Ito: told apart by the colour-blind, and by their lightness in black and white.
_OURS, _DDP, _HOROVOD = "#0072B2", "#E69F00", "#A9D8C2"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: one panel a set-up, one bar a contestant, the ratio of its tokens per second to the limit's."""
    columns = min(len(results), _PANELS_A_ROW)
    rows = -(-len(results) // columns)
    names = list(
        dict.fromkeys(
            standing["name"]
            for result in results.values()
            for standing in result["standings"]
            if standing["name"] != LIMIT
        )
    )
    figure = Figure(figsize=(2.5 + 2.2 * columns, rows * (1 + 0.24 * len(names))), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, result in zip(panels, results.values(), strict=False):
        _draw_panel(panel, result, names)
    for panel in panels[len(results) :]:
        panel.set_visible(False)
    figure.supxlabel("tokens per second, of those without communication", fontsize=9)
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=200)


def _draw_panel(panel: Axes, result: Mapping[str, Any], names: list[str]) -> None:
    standings = {standing["name"]: standing for standing in result["standings"]}
    panel.set_title(result["setup"]["name"], fontsize=9)
    panel.axvline(1, color="black", linewidth=0.8, linestyle="--")
    for place, name in enumerate(names):
        ratio = standings[name]["of_limit"] if name in standings else None
        if ratio is not None:
            panel.barh(place, ratio, color=_colour(name), edgecolor="black", linewidth=0.5)
            panel.text(min(ratio, _RIGHT - 0.2) + 0.02, place, f"{ratio:.2f}", va="center", fontsize=7, bbox=_PLAIN)
        elif name in standings:
            panel.text(0.02, place, "crashed", va="center", fontsize=7)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlim(0, _RIGHT)
    panel.tick_params(axis="x", labelsize=7)


def _colour(name: str) -> str:
    if is_ours(name):
        return _OURS
    return _HOROVOD if name.startswith("Horovod") else _DDP
