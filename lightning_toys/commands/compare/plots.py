"""The pictures of a comparison: a metric of every run, each seed, mean and interval."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_toys.commands.compare.runs import Run
from lightning_toys.plotting import COLOURS, GREY, new_figure
from lightning_toys.stats import mean_ci


def draw(runs: Sequence[Run], metric: str) -> Any:
    """Draw a metric of every run: each seed, mean and interval; reference rows as lines."""
    shown = [r for r in runs if r.values(metric)]
    figure, axes = new_figure(size=(7.6, 0.42 * len(shown) + 2.0))
    ax = axes[0, 0]
    found = [np.array(list(r.values(metric).values())) for r in shown]
    everything = np.concatenate(found) if found else np.ones(1)
    # over less than a decade a logarithmic axis has no readable ticks
    positive = everything.min() > 0 and everything.max() > 5 * everything.min()
    low = everything.min()
    for i, values in enumerate(found):
        e = mean_ci(values)
        half = 0.0 if math.isnan(e.half_width) else e.half_width
        left = min(half, e.mean - low / 4) if positive else half  # a logarithmic axis has no 0: the bar leaves it
        ax.plot(
            values, np.full(values.size, i), "o", color=COLOURS[0], alpha=0.6, markersize=4, label="_seeds", zorder=4
        )
        ax.errorbar(e.mean, i, xerr=[[left], [half]], fmt="D", color=COLOURS[1], capsize=4, markersize=6, zorder=3)
    styles = (":", "--", "-.", (0, (1, 1)), (0, (5, 1)))
    references = shown[0].content["references"] if shown else {}
    for (name, row), style in zip(references.items(), styles, strict=False):
        value = row.get(metric)
        # a spline may be orders below: it would squeeze everything else
        if value is not None and (value > low / 30 if positive else value > -np.abs(everything).max() * 20):
            ax.axvline(value, color=GREY, linestyle=style, linewidth=1.1, label=f"{name.replace('_', ' ')} {value:.3g}")
    ax.plot([], [], "o", color=COLOURS[0], alpha=0.4, label="each seed")
    ax.errorbar([], [], xerr=[], fmt="D", color=COLOURS[1], capsize=4, label="mean and 95 % CI")
    if positive:
        ax.set_xscale("log")
        ax.set_xlim(left=low / 2)
    ax.set_yticks(range(len(shown)), [r.label for r in shown])
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlabel((shown[0].label_of(metric) if shown else metric) + (f": {runs[0].group}" if runs[0].group else ""))
    figure.legend(*ax.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    return figure


def pictures_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Return a figure for each metric of runs on one target, by file name."""
    metrics = list(dict.fromkeys(m for r in runs for m in r.main_metrics))
    shown = [m for m in metrics if any(any(r.values(m).values()) for r in runs)]
    end = f"-{slug(runs[0].group)}" if runs[0].group else ""
    return {f"{m}{end}": draw(runs, m) for m in shown}


def slug(name: str) -> str:
    """Return a group's name for a file."""
    return re.sub(r"[^\w.=-]+", "_", name).strip("_")[:80]
