"""Figures of the stream: outer loss over time, weights by lag, truth and prediction."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_toys.bilevel.curves import draw_seeds
from lightning_toys.bilevel.regression.metrics import mean_of_last_sixth, normalised
from lightning_toys.plotting import COLOURS, GREY, MARKERS, new_figure
from lightning_toys.training.results import Report
from lightning_toys.training.results_format import read_results

MOST_PROFILES = 24  # panels of weights


def stream_of(references: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return what tells streams apart: what fixed weights score with an exact inner solver, which no picture shows.

    In a picture of outer losses these would look like runs that a network could have had. Runs of the same weights are
    what to compare with: ``--model.algorithm optimum``, ``lag_1``, ``uniform`` and ``no_tracking``.
    """
    # results of 0.1.0 have them as outer losses
    return repr({name: row.get("exact_loss", row.get("outer_loss")) for name, row in sorted(references.items())})


def label_loss_axes(ax: Axes) -> None:
    """Scale and label the axes of an outer loss."""
    ax.set_yscale("log")
    ax.set_xlabel("time t (steps)")
    ax.set_ylabel("outer loss, mean of 30 steps")


def draw_loss(report: Report, label: str) -> Figure:
    """Draw the rolling outer loss of every seed and their median."""
    figure, axes = new_figure(size=(7.0, 4.6))
    ax, rows = axes[0, 0], np.array(report.arrays["outer_loss"])
    seeds = f"{len(rows)} seed{'s' if len(rows) > 1 else ''}"
    draw_seeds(ax, np.array(report.arrays["time"], dtype=float), rows, COLOURS[0], f"{label}, {seeds}")
    note = ": each seed, and their median" if len(rows) > 1 else ""
    label_loss_axes(ax)
    ax.set_title(f"{label}, {seeds}{note}", fontsize=10)
    return figure


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


def draw_profiles(shown: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the last sixth's share of each lag, a panel for each run: every seed, and the best if solved exactly.

    Args:
        shown: label to results, whose arrays hold ``weights_by_seed``.
    """
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    size = (max(4.8, 2.9 * columns), 0.8 + 2.3 * rows)
    figure, axes = new_figure(rows, columns, size=size, sharex=True, sharey=True)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for k, (ax, (label, results)) in enumerate(zip(axes.flat, shown.items(), strict=False)):
        arrays = results["arrays"]
        for row in arrays["weights_by_seed"]:
            ax.plot(np.arange(1, len(row) + 1), row, color=COLOURS[0], alpha=0.6, linewidth=1)
        if best := arrays.get("best_weights"):
            ax.plot(np.arange(1, len(best) + 1), best, "o", color=COLOURS[1], markersize=3)
        ax.set_title(textwrap.fill(label, 36), fontsize=8)
        if k + columns >= len(shown):  # below it there is none
            ax.set_xlabel("lag (steps)")
            ax.tick_params(labelbottom=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("weight / sum")
    figure.suptitle("weight of each lag, last sixth; lines: each seed; dots: best if solved exactly", fontsize=9)
    return figure


def compare_figures(runs: dict[str, Path]) -> dict[str, Figure]:
    """Return the outer loss over time of runs (label to folder), and their weights; none if no run is finished.

    A panel holds the runs on one stream.
    """
    found = {label: folder / "results.json" for label, folder in runs.items()}
    shown = {label: read_results(path) for label, path in found.items() if path.exists()}
    panels: dict[str, list[str]] = {}
    for label, results in shown.items():
        panels.setdefault(stream_of(results["references"]), []).append(label)
    if not panels:
        return {}
    figure, axes = new_figure(len(panels), 1, size=(7.6, 5.2 if len(panels) == 1 else 1.2 + 4.2 * len(panels)))
    for ax, labels in zip(axes[:, 0], panels.values(), strict=True):
        for i, label in enumerate(labels):  # colours begin anew in each panel, so that fewer runs share one
            arrays = shown[label]["arrays"]
            rows = np.array(arrays["outer_loss"])
            colour = COLOURS[i % len(COLOURS)]
            draw_seeds(ax, np.array(arrays["time"], dtype=float), rows, colour, f"{label}, {len(rows)} seeds")
        label_loss_axes(ax)
        if len(panels) > 1:
            ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if len(panels) == 1:
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    streams = "; a panel for each stream" if len(panels) > 1 else ""
    figure.suptitle(f"each seed, and their median{streams}", fontsize=10)
    weighted = {  # runs whose weights do something, up to what a page holds
        label: r for label, r in shown.items() if "exact_loss" in r["metrics"] and "weights_by_seed" in r["arrays"]
    }
    profiles = {"lag_weights": draw_profiles(dict(list(weighted.items())[:MOST_PROFILES]))} if weighted else {}
    return {"outer_loss_curves": figure, **profiles}
