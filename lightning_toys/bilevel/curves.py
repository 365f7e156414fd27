"""Curves of several seeds on a logarithmic axis."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from lightning_toys.plotting import MARKERS


def draw_seeds(ax: Axes, x: np.ndarray, rows: np.ndarray, colour: str, label: str) -> None:
    """Draw every seed's curve (R, len(x)) thin, and their median.

    An interval of the mean, symmetric in the values, is no interval on a logarithmic axis: it reaches down to 0 and
    below as soon as one seed is far from the others.
    """
    marker = MARKERS[0] if len(x) == 1 else None  # a lone point has no line
    if len(rows) > 1:
        for row in rows:
            ax.plot(x, row, color=colour, alpha=0.3, linewidth=0.7, marker=marker, markersize=3)
    ax.plot(x, np.median(rows, axis=0), color=colour, linewidth=1.7, marker=marker, label=label)
