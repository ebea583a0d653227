"""The plot of a comparison: the speed of each system over that of training without communication, by set-up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.plots import save_png
from compare.registry import LIMIT, is_hvdlm
from hvdlm.report.palette import BLUE, ORANGE

_PANELS_PER_ROW = 4
_AXIS_END = 1.25  # the limit is at 1
_LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # behind the number of a bar
_LIGHT_GREEN = "#A9D8C2"  # lighter than the other two, to be told apart in black and white


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG with one panel per set-up and one bar per system: its tokens per second over the limit's."""
    columns = min(len(results), _PANELS_PER_ROW)
    rows = -(-len(results) // columns)
    all_names = (row["name"] for result in results.values() for row in result["summary"])
    names = list(dict.fromkeys(name for name in all_names if name != LIMIT))
    figure = Figure(figsize=(2.5 + 2.2 * columns, rows * (1 + 0.24 * len(names))), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, result in zip(panels, results.values(), strict=False):
        _draw_panel(panel, result, names)
    for panel in panels[len(results) :]:
        panel.set_visible(False)
    figure.supxlabel("tokens per second, over those of training without communication", fontsize=9)
    save_png(figure, path)


def _draw_panel(panel: Axes, result: Mapping[str, Any], names: list[str]) -> None:
    ratios = {row["name"]: row["of_limit"] for row in result["summary"]}
    panel.set_title(result["setup"]["name"], fontsize=9)
    panel.axvline(1, color="black", linewidth=0.8, linestyle="--")
    for y, name in enumerate(names):
        ratio = ratios.get(name)
        if ratio is not None:
            panel.barh(y, ratio, color=_colour(name), edgecolor="black", linewidth=0.5)
            x = min(ratio, _AXIS_END - 0.2) + 0.02
            panel.text(x, y, f"{ratio:.2f}", va="center", fontsize=7, bbox=_LABEL_BOX)
        elif name in ratios:
            panel.text(0.02, y, "crashed", va="center", fontsize=7)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlim(0, _AXIS_END)
    panel.tick_params(axis="x", labelsize=7)


def _colour(name: str) -> str:
    if is_hvdlm(name):
        return BLUE
    return _LIGHT_GREEN if name.startswith("Horovod") else ORANGE
