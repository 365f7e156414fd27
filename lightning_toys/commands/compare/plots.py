"""The pictures of a comparison: a metric of every run, each seed, mean and interval."""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_toys.commands.compare.runs import Run
from lightning_toys.plotting import COLOURS, GREY, literal, literal_lines, new_figure, shortened
from lightning_toys.stats import geometric_ci, mean_ci

MOST_INCHES = 400.0  # 60 000 of the 65 536 pixels that a picture may have
SMALLEST = 1e-300  # on a logarithmic axis, which leaves some room below it
STYLES: tuple[Any, ...] = (":", "--", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)), "-")


def draw(runs: Sequence[Run], metric: str) -> Any:
    """Draw a metric of every run: each seed, mean and interval, and each run's own reference rows as lines.

    Of errors (:attr:`Run.error_metrics`) mean and interval are geometric: no bar reaches 0. A label says where a run's
    values are not all finite, and how many are.
    """
    shown = [r for r in runs if r.seeds_of(metric)]
    labels = [literal_lines(r.label) + r.left_out(metric) for r in shown]
    heights = np.array([max(1.0, 0.5 * (1 + x.count("\n"))) for x in labels])  # of rows
    places = (np.cumsum(heights) - heights / 2 - 0.5).tolist()
    longest = max(len(line) for x in labels for line in x.split("\n"))
    height = min(0.42 * float(heights.sum()) + 2.0, MOST_INCHES)
    figure, axes = new_figure(size=(7.6 + 0.1 * max(0, longest - 30), height))
    ax = axes[0, 0]
    raw = [np.array(list(r.values(metric).values())) for r in shown]
    unit = extreme_unit(np.concatenate(raw))
    found = [values / unit for values in raw]
    everything = np.concatenate(found)
    # over less than a decade a logarithmic axis has no readable ticks
    positive = bool(everything.min() > SMALLEST and everything.max() > 5 * everything.min())
    low, high = float(everything.min()), float(np.abs(everything).max())
    drawn = [(y, values, geometric_ci(values)) for y, values in zip(places, found, strict=True) if values.size]
    multiplies = all(metric in r.error_metrics for r in shown) and all(e is not None for _, _, e in drawn)
    for y, values, logs in drawn:
        e = logs if multiplies and logs is not None else mean_ci(values)
        left, half = (0.0 if math.isnan(x) else x for x in (e.mean - e.lo, e.hi - e.mean))
        if positive and not multiplies:
            left = min(left, e.mean - low / 4)  # a logarithmic axis has no 0: the bar leaves it
        half = min(half, 1e6 * high)  # of two seeds that are orders apart it may be no double
        ax.plot(
            values, np.full(values.size, y), "o", color=COLOURS[0], alpha=0.6, markersize=4, label="_seeds", zorder=4
        )
        ax.errorbar(e.mean, y, xerr=[[left], [half]], fmt="D", color=COLOURS[1], capsize=4, markersize=6, zorder=3)
    # a spline may be orders away: it would squeeze everything else
    window = (low / 30, high * 1e6) if positive else (-20 * high, high * 1e6)
    draw_references(ax, shown, places, [drawn_baselines(r, metric, unit, window) for r in shown])
    ax.plot([], [], "o", color=COLOURS[0], alpha=0.4, label="each seed")
    middle = "geometric mean" if multiplies else "mean"
    ax.errorbar([], [], xerr=[], fmt="D", color=COLOURS[1], capsize=4, label=f"{middle} and 95 % CI")
    if positive:
        ax.set_xscale("log")
        ax.set_xlim(left=low / 2)
    pitch = 72 * (height - 2.0) / float(heights.sum())  # points from one row to the next
    ax.set_yticks(places, labels, fontsize=min(10.0, pitch))
    ax.set_ylim(heights.sum() - 0.4, -0.6)
    ax.set_xlabel(axis_label(shown[0], metric) + (f", in units of {unit:.0e}" if unit != 1 else ""))
    handles, names = ax.get_legend_handles_labels()
    columns = max(1, min(4, int(figure.get_figwidth() / (0.4 + 0.07 * max(map(len, names))))))
    figure.legend(handles, names, frameon=False, fontsize=8, ncols=columns, loc="outside upper center")
    return figure


def extreme_unit(values: np.ndarray) -> float:
    """Return what values are divided by before they are drawn: 1, or for numbers near a double's end a power of ten."""
    top = float(np.abs(values).max())
    return float(f"1e{math.floor(math.log10(top))}") if top >= 1e100 or 0 < top <= 1e-100 else 1.0


def drawn_baselines(run: Run, metric: str, unit: float, window: tuple[float, float]) -> dict[str, float]:
    """Return a run's baselines of a metric by name, in units; those beyond a window are left out."""
    found = {name: row.get(metric) for name, row in run.content["references"].items()}
    scaled = {name: float(value) / unit for name, value in found.items() if value is not None}
    return {name: value for name, value in scaled.items() if window[0] <= value <= window[1]}


def draw_references(
    ax: Any, runs: Sequence[Run], places: Sequence[float], baselines: Sequence[dict[str, float]]
) -> None:
    """Draw what needs no network: one line where it is the same for all runs, else a piece beside each run's row.

    Args:
        ax: whose row at ``places[i]`` is of run i.
        runs: in the order of the rows.
        places: the middle of each row.
        baselines: each run's, by name.
    """
    for i, name in enumerate(dict.fromkeys(name for own in baselines for name in own)):
        how: dict[str, Any] = {"color": GREY, "linestyle": STYLES[i % len(STYLES)], "linewidth": 1.1}
        label = literal(shortened(name, 60))
        rows = [j for j, own in enumerate(baselines) if name in own]
        words = {j: f"{baselines[j][name]:.4g}" for j in rows}
        value = baselines[rows[0]][name]
        if len(rows) == len(runs) and len(set(words.values())) == 1:
            ax.axvline(value, label=f"{label} {value:.3g}", **how)
            continue
        label = f"{label}, each run's own"
        for _, group in itertools.groupby(enumerate(rows), key=lambda x: (words[x[1]], x[1] - x[0])):
            piece = [j for _, j in group]
            low, high = places[piece[0]] - 0.42, places[piece[-1]] + 0.42
            ax.vlines(baselines[piece[0]][name], low, high, label=label, **how)
            label = "_again"


def axis_label(run: Run, metric: str) -> str:
    """Return a metric's name for its axis, and the runs' target. What an experiment calls it may hold mathematics."""
    named = run.label_of(metric)
    whole = named if named != metric and draws(named) else literal_lines(named, width=80, lines=2)
    return whole + (f": {literal(shortened(run.group, 80))}" if run.group else "")


def draws(text: str) -> bool:
    """Whether matplotlib can read the mathematics of a text, if it has any."""
    from matplotlib.mathtext import MathTextParser

    if not text.isprintable() or len(text) > 160:
        return False
    try:
        MathTextParser("path").parse(text)
    except (ValueError, RuntimeError, RecursionError):
        return False
    return True


def pictures_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Return a figure for each metric of runs on one target, by name."""
    metrics = list(dict.fromkeys(m for r in runs for m in r.main_metrics))
    shown = [m for m in metrics if any(any(r.values(m).values()) for r in runs)]
    end = f"-{slug(runs[0].group)}" if runs[0].group else ""
    return {f"{m}{end}": draw(runs, m) for m in shown}


def slug(name: str) -> str:
    """Return a group's name for a file."""
    return re.sub(r"[^\w.=-]+", "_", name).strip("_")[:80]


def png(figure: Any) -> bytes:
    """Return a figure as the content of a PNG file.

    Characters that the font lacks are boxes, and a layout that does not fit is left as it is, without a warning.
    """
    held = io.BytesIO()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message=r".*layout not applied", category=UserWarning)
        figure.savefig(held, format="png", dpi=150)
    return held.getvalue()
