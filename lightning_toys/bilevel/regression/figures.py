"""Figures of the stream: outer loss over time, weights by lag, truth and prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_toys.bilevel.regression.metrics import mean_of_last_sixth, normalised
from lightning_toys.plotting import COLOURS, GREY, MARKERS, band, new_figure
from lightning_toys.training.results import Report

BASELINES = {
    "oracle": ("best weights", "--"),
    "uniform": ("equal weights", ":"),
    "lag_1": ("lag 1 alone", (0, (1, 4))),
    "no_tracking": ("no tracking", "-."),
}


def draw_baselines(ax: Axes, references: dict[str, dict[str, float]]) -> None:
    """Draw horizontal lines at the outer loss of fixed weights under an exact inner solver.

    Args:
        ax: of an outer loss.
        references: a report's: ``oracle``, ``uniform``, ``lag_1``, ``no_tracking`` to ``{"outer_loss": value}``.
    """
    for name, (label, style) in BASELINES.items():
        value = references.get(name, {}).get("outer_loss")
        if value is not None and np.isfinite(value):
            ax.axhline(value, color=GREY, linestyle=style, linewidth=1.1, label=f"{label}: {value:.3g}")


def label_loss_axes(figure: Figure, ax: Axes, title: str) -> Figure:
    """Scale and label the axes of an outer loss."""
    ax.set_yscale("log")
    ax.set_xlabel("time t (steps)")
    ax.set_ylabel("outer loss, mean of 30 steps")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    ax.set_title(title, fontsize=10)
    return figure


def draw_loss(report: Report, label: str) -> Figure:
    """Draw the rolling outer loss, mean and 95 % interval over replicas, and the closed-form lines."""
    figure, axes = new_figure(size=(7.0, 4.6))
    ax, rows = axes[0, 0], np.array(report.arrays["outer_loss"])
    seeds = f"{len(rows)} seed{'s' if len(rows) > 1 else ''}"
    band(ax, np.array(report.arrays["time"], dtype=float), rows, COLOURS[0], f"{label}, {seeds}")
    draw_baselines(ax, report.references)
    note = ": mean and 95 % interval over seeds" if len(rows) > 1 else ""
    return label_loss_axes(figure, ax, f"{label}{note}; grey: exact inner solver")


def draw_weights(lam: Tensor, every: int, oracle: np.ndarray, label: str) -> Figure:
    """Draw the normalised weights, mean over replicas: lag against time, and the last sixth beside the best.

    Args:
        lam: weights (n, R, W) at every ``every``-th step.
        every: steps between two.
        oracle: the best weights (W,).
        label: name of the run.
    """
    figure, axes = new_figure(1, 2, size=(9.6, 4.0), width_ratios=[2.2, 1], sharey=True)
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr,call-arg]
    heat_map, profile = axes[0]
    w = normalised(lam).mean(1).numpy()
    n, lags = w.shape[0], np.arange(1, w.shape[1] + 1)
    heat_map.grid(False)
    edges = (np.arange(n + 1) * every, np.arange(w.shape[1] + 1) + 0.5)
    mesh = heat_map.pcolormesh(*edges, w.T, cmap="cividis", vmin=0, rasterized=True)
    figure.colorbar(mesh, ax=heat_map, pad=0.02).ax.set_title("weight / sum", fontsize=8)
    heat_map.set_xlabel("time t (steps)")
    heat_map.set_ylabel("lag (steps)")
    late = normalised(mean_of_last_sixth(lam)).numpy()
    for row in late:
        profile.plot(row, lags, color=COLOURS[0], alpha=0.45, linewidth=1)
    profile.plot(late.mean(0), lags, color=COLOURS[0], linewidth=1.8, label="learned: seeds, mean")
    profile.plot(oracle, lags, "o", color=COLOURS[1], markersize=3.5, label="best if solved exactly")
    profile.set_ylabel("lag (steps)")
    profile.tick_params(labelleft=True)
    profile.set_xlabel("weight / sum, last sixth of the run")
    profile.legend(frameon=False, fontsize=8, loc="center right")
    figure.suptitle(f"{label}: weight of each lag, mean over {lam.shape[1]} seed{'s' if lam.shape[1] > 1 else ''}")
    return figure


def draw_prediction(truth: Tensor, prediction: Tensor, label: str) -> Figure:
    """Draw y_t against h at the outer points (B', d) of the first replica, at the last time."""
    figure, axes = new_figure(size=(4.8, 4.4))
    ax = axes[0, 0]
    ends = [float(min(truth.min(), prediction.min())), float(max(truth.max(), prediction.max()))]
    ax.plot(ends, ends, color=GREY, linewidth=1, label="y = h")
    for i in range(truth.shape[1]):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        ax.plot(prediction[:, i], truth[:, i], marker, color=colour, markersize=3.5, alpha=0.6, label=f"output {i + 1}")
    ax.set_xlabel("prediction h")
    ax.set_ylabel("truth y, with its noise")
    ax.set_title(f"{label}: outer points at the last time, one seed", fontsize=10)
    ax.legend(frameon=False, fontsize=8)
    return figure


def compare_figures(runs: dict[str, Path]) -> dict[str, Figure]:
    """Return the outer loss over time of runs (label to folder) in one figure; none if no run is finished."""
    figure, axes = new_figure(size=(7.6, 5.2))
    ax, references = axes[0, 0], {}
    found = [(label, folder / "results.json") for label, folder in runs.items()]
    shown = [(label, json.loads(path.read_text())) for label, path in found if path.exists()]
    for i, (label, results) in enumerate(shown):
        arrays, references = results["arrays"], results["references"]
        rows = np.array(arrays["outer_loss"])
        band(ax, np.array(arrays["time"], dtype=float), rows, COLOURS[i % len(COLOURS)], f"{label}, {len(rows)} seeds")
    if not shown:
        return {}
    # lines belong to one stream: the last run's, as all are compared on it
    draw_baselines(ax, {k: {m: x for m, x in v.items() if x is not None} for k, v in references.items()})
    return {"outer_loss_curves": label_loss_axes(figure, ax, "mean and 95 % interval over seeds")}
