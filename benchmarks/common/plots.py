"""What the plots of all benchmarks have in common."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# The palette of Okabe and Ito ("Color Universal Design", 2008), which colour-blind readers can tell apart.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY_BLUE, YELLOW = "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"


def save_png(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG of 200 dots per inch."""
    FigureCanvasAgg(figure).print_figure(path, format="png", dpi=200)
