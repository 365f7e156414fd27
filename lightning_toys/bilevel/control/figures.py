"""Learning curves of one run, and of agents side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_toys.plotting import COLOURS, band, new_figure
from lightning_toys.training.metrics_csv import read_csv, replica_columns

AGENTS = ("omd", "funcbo", "mle", "vep")
PANELS = (
    ("return", "return, greedy actions"),
    ("td_error", "RMS of d - y"),
    ("model_error", "RMS error of the next state"),
)


def draw_training(folder: Path, seeds: Sequence[int], label: str) -> dict[str, Figure]:
    """Draw return, value error and model error over environment steps: seeds thin, their mean and interval."""
    path = folder / "metrics.csv"
    rows = read_csv(path) if path.exists() else []
    steps, _ = replica_columns(rows, "eval/return", seeds)
    if not len(steps):
        return {}
    figure, axes = new_figure(1, 3, size=(11.5, 3.4))
    for ax, (name, title), colour in zip(axes[0], PANELS, COLOURS, strict=False):
        steps, values = replica_columns(rows, f"eval/{name}", seeds)
        if not len(steps):
            continue
        for one in values if len(seeds) > 1 else []:
            ax.plot(steps, one, color=colour, alpha=0.25, linewidth=0.7)
        band(ax, steps, values, colour, label)
        finish(ax, title)
    shown = f"{len(seeds)} seeds thin, mean with 95 % interval" if len(seeds) > 1 else "one seed"
    figure.suptitle(f"{label} ({shown})", fontsize=10)
    return {"learning": figure}


def finish(ax: Axes, title: str) -> None:
    """Label a panel's axes; errors over decades get a logarithm."""
    ax.set_xlabel("environment steps")
    ax.set_ylabel(title)
    if "error" in title or "RMS" in title:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)


def draw_comparison(runs: dict[str, Path]) -> dict[str, Figure]:
    """Draw runs side by side: a row of panels for each width of the model, a colour for each agent.

    Args:
        runs: label to run folder.
    """
    found: dict[str, dict[str, tuple[list[int], list[dict[str, str]]]]] = {}
    for label, folder in runs.items():
        results, table = folder / "results.json", folder / "metrics.csv"
        if results.exists() and table.exists():
            agent, _, width = label.partition(", ")
            seeds = json.loads(results.read_text())["seeds"]
            found.setdefault(width, {})[agent] = (seeds, read_csv(table))
    if not found:
        return {}
    figure, axes = new_figure(len(found), 3, size=(11.5, 0.6 + 3.1 * len(found)))
    for row, (width, agents) in zip(axes, found.items(), strict=True):
        # an agent has its colour whatever else is in the picture
        names = [a for a in AGENTS if a in agents] + [a for a in agents if a not in AGENTS]
        for ax, (metric, title) in zip(row, PANELS, strict=True):
            for i, name in enumerate(names):
                seeds, rows = agents[name]
                steps, values = replica_columns(rows, f"eval/{metric}", seeds)
                if len(steps):
                    colour = COLOURS[AGENTS.index(name) if name in AGENTS else (4 + i) % len(COLOURS)]
                    band(ax, steps, values, colour, f"{name}, {len(values)} seeds")
            finish(ax, title)
        row[0].set_title(width, fontsize=9, loc="left")
        row[0].legend(frameon=False, fontsize=8)
    figure.suptitle("agents: mean and 95 % interval over seeds", fontsize=10)
    return {"agents": figure}


def last_third(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last third of the evaluations (R,) of values (R, n)."""
    out: np.ndarray = values[:, -max(1, values.shape[1] // 3) :].mean(1)
    return out
