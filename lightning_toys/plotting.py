"""One style for all figures: Okabe and Ito's colour-blind-safe palette, and plain axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_toys.errors import printable
from lightning_toys.stats import mean_ci, t_quantile

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#666666"
ACROSS = 3  # blocks of panels side by side, see :func:`blocks`


def nth_colour(i: int) -> str:
    """Return the colour of the i-th of any number of lines: the palette's, over and over.

    >>> nth_colour(1) == COLOURS[1] == nth_colour(9)
    True
    """
    return COLOURS[i % len(COLOURS)]


def nth_marker(i: int) -> str:
    """Return the marker of the i-th of any number of lines, see :func:`nth_colour`."""
    return MARKERS[i % len(MARKERS)]


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.0), **kwargs: Any
) -> tuple[Figure, np.ndarray]:
    """Return an off-screen figure, without pyplot's global state, and its axes as an array (rows, columns).

    ``size`` is in inches; ``kwargs`` go to ``Figure.subplots``.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#e6e6e6", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def blocks(count: int, rows: int = 1, width: float = 2.9, **kwargs: Any) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of ``count`` blocks of ``rows`` panels one below the other, and the panels by block.

    At most :data:`ACROSS` blocks stand side by side, the next below them: on a page of 600 pixels words stay readable.

    Args:
        count: blocks.
        rows: panels of each.
        width: of a panel in inches.
        kwargs: go to ``Figure.subplots``.

    >>> figure, panels = blocks(5, 2)
    >>> len(panels), len(panels[4]), len([ax for ax in figure.axes if not ax.axison])
    (5, 2, 2)
    >>> (one,), (other,) = blocks(2, sharey=True)[1]
    >>> one.get_shared_y_axes().joined(one, other)
    True
    """
    columns, lines = min(count, ACROSS), math.ceil(count / ACROSS)
    height = (width + 0.2) * rows * lines + 0.4
    figure, axes = new_figure(rows * lines, columns, size=(max(6.0, width * columns + 0.4), height), **kwargs)
    found = [[axes[j // columns * rows + i, j % columns] for i in range(rows)] for j in range(lines * columns)]
    for ax in (ax for block in found[count:] for ax in block):
        ax.set_axis_off()
    return figure, found[:count]


def literal(name: str) -> str:
    r"""Return a name as matplotlib's texts show it: no mathematics, on one line, never left out of a legend.

    >>> literal("_$x$")
    ' _\\$x\\$'
    """
    shown = printable(name).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves labels out that begin with it


def shortened(name: str, most: int) -> str:
    """Return a name's beginning and end where it has more than ``most`` characters."""
    return name if len(name) <= most else f"{name[: most - most // 3 - 1]}…{name[-(most // 3) :]}"


def literal_lines(name: str, width: int = 44, lines: int = 4) -> str:
    """Return a name as :func:`literal` does, on as many lines as it takes."""
    shown = shortened(printable(name), width * lines)
    return "\n".join(literal(shown[i : i + width]) for i in range(0, len(shown), width))


def band(ax: Axes, x: np.ndarray, rows: np.ndarray, colour: str, label: str, linestyle: str = "-") -> None:
    """Draw the mean of ``rows`` (R, len(x)) over replicas as a line, and its 95 % Student-t interval as a band."""
    if len(x) == 1:  # a lone point has no line
        error_bars(ax, [float(x[0])], rows, colour, label)
        return
    with np.errstate(over="ignore", invalid="ignore"):  # of values near a double's end: a gap in the line
        mean, n = rows.mean(0), rows.shape[0]
        half = t_quantile(0.975, n - 1) * rows.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(len(x))
    ax.plot(x, mean, color=colour, label=label, linestyle=linestyle, linewidth=1.6)
    if n > 1:
        ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.22, linewidth=0)


def error_bars(ax: Axes, x: Sequence[float], rows: np.ndarray, colour: str, label: str, marker: str = "o") -> None:
    """Draw the mean of ``rows`` (R, len(x)) over replicas as points, with 95 % Student-t intervals as error bars."""
    estimates = [mean_ci(column) for column in rows.T]
    half = [0.0 if np.isnan(e.half_width) else e.half_width for e in estimates]
    ax.errorbar(
        x, [e.mean for e in estimates], yerr=half, color=colour, label=label, marker=marker, capsize=3, linewidth=1.4
    )
