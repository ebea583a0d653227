"""What the plots of all benchmarks have in common."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save_png(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG of 200 dots per inch."""
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=200)
