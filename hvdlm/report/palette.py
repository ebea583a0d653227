"""Colours of all pictures, which colour-blind readers can tell apart.

The palette of Okabe and Ito ("Color Universal Design", 2008).
"""

from __future__ import annotations

BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY_BLUE, YELLOW = "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"
