"""Figures of samples over the target's contours, of one mode enlarged, and of metrics over training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from lightning_toys.errors import ToyError, note
from lightning_toys.generative_policy.mixture import Mixture, Target, ThreeModes
from lightning_toys.imports import load_class
from lightning_toys.plotting import COLOURS, GREY, band, new_figure
from lightning_toys.training.files import make_folder, read_text, set_aside, whole_file
from lightning_toys.training.metrics_reader import read_csv, replica_columns
from lightning_toys.training.results import Report

Array = NDArray[np.float64]
BLUE, RED = COLOURS[0], "#B40426"
SNAPSHOTS = "samples"  # folder of a run that keeps samples by training step


@dataclass
class FigureData:
    """What the figures of an evaluation are drawn from.

    Attributes:
        target: the target distribution.
        samples: readout to samples (R, n, 2).
        seeds: the replicas' seeds.
    """

    target: Target
    samples: dict[str, Tensor]
    seeds: Sequence[int]


def save_snapshot(folder: Path, step: int, data: FigureData) -> None:
    """Save the first replica's samples by the main readout as ``samples/step_*.npy``; an older file is set aside."""
    path = folder / SNAPSHOTS / f"step_{step:08d}.npy"
    make_folder(path.parent)
    first = next(iter(data.samples.values()))[0].float().numpy()
    if path.exists() and np.array_equal(np.load(path, allow_pickle=False), first):
        return
    set_aside(path)
    with whole_file(path) as f:
        np.save(f, first)


def read_snapshots(folder: Path) -> dict[int, Array]:
    """Return the samples (n, 2) that :func:`save_snapshot` wrote, by training step."""
    out = {}
    for path in sorted((folder / SNAPSHOTS).glob("step_*.npy")):
        word = path.stem.removeprefix("step_")
        if word.isdigit() and path.is_file():  # not those set aside
            out[int(word)] = np.load(path, allow_pickle=False)
    return out


def draw_contours(ax: Axes, target: Target, half: float = 1.0, centre: Sequence[float] = (0.0, 0.0)) -> None:
    """Draw the target's density in red over a square of half-width ``half`` around ``centre``."""
    n = 400 if not isinstance(target, Mixture) or len(target.means) <= 16 else 120
    x = np.linspace(centre[0] - half, centre[0] + half, n)
    y = np.linspace(centre[1] - half, centre[1] + half, n)
    grid = torch.from_numpy(np.stack(np.meshgrid(x, y), -1))
    density = target.log_prob(grid)
    top = float(density.max())
    if isinstance(target, Mixture):
        # the levels 1, 2 and 3 standard deviations from a lone peak
        ax.contour(x, y, density - top, levels=[-4.5, -2.0, -0.5], colors=RED, linewidths=0.8, linestyles="solid")
    else:
        ax.contourf(x, y, density.isfinite(), levels=[0.5, 1.5], cmap=ListedColormap([RED]), alpha=0.25)
    ax.set_xlim(centre[0] - half, centre[0] + half)
    ax.set_ylim(centre[1] - half, centre[1] + half)
    ax.set_aspect("equal")


def draw_scatter(ax: Axes, target: Target, x: Array, title: str) -> None:
    """Draw samples x (n, 2) in blue over the target's contours."""
    ax.plot(x[:, 0], x[:, 1], ".", color=BLUE, markersize=1.6, alpha=0.5, rasterized=True)
    draw_contours(ax, target, half=1.05)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("action 1")


def draw_mode_zoom(ax: Axes, target: Mixture, x: Array, mode: int, title: str) -> None:
    """Draw the samples x (n, 2) around one component, with circles at 1, 2 and 3 standard deviations."""
    centre, std = target.means[mode].numpy(), float(target.stds[mode])
    half = 4.5 * std
    near = x[np.abs(x - centre).max(1) < half]
    ax.plot(near[:, 0], near[:, 1], ".", color=BLUE, markersize=2.2, alpha=0.6, rasterized=True)
    for k in (1, 2, 3):
        ax.add_patch(Circle((float(centre[0]), float(centre[1])), k * std, fill=False, edgecolor=RED, linewidth=0.9))
    ax.set_xlim(centre[0] - half, centre[0] + half)
    ax.set_ylim(centre[1] - half, centre[1] + half)
    ax.set_aspect("equal")
    ax.locator_params(nbins=4)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("action 1")


def readout_label(readout: str) -> str:
    """Return a readout's name in words.

    >>> readout_label("1"), readout_label("euler-8"), readout_label("dopri5")
    ('one step', '8 Euler steps', 'dopri5')
    """
    if readout.isdigit():
        return "one step" if readout == "1" else f"{readout} steps"
    kind, _, n = readout.partition("-")
    return f"{n} Euler step{'' if n == '1' else 's'}" if kind == "euler" else readout


def draw_samples(data: FigureData, report: Report, label: str) -> Figure:
    """Draw each readout's samples (the first four), and one mode of each enlarged."""
    names = list(data.samples)[:4]
    # a policy with one readout shows some seeds in place of readouts
    columns = [(n, 0) for n in names] if len(names) > 1 else [(names[0], r) for r in range(min(4, len(data.seeds)))]
    zoom = isinstance(data.target, Mixture)
    figure, axes = new_figure(1 + zoom, len(columns), size=(3.1 * len(columns) + 0.4, 3.2 * (1 + zoom) + 0.3))
    for j, (name, r) in enumerate(columns):
        x = data.samples[name][r].numpy()
        at = f"@{name}" if len(names) > 1 else ""
        tv, off = report.metrics[f"tv{at}"][r], report.metrics[f"off3{at}"][r]
        what = readout_label(name) if len(names) > 1 else f"seed {data.seeds[r]}"
        draw_scatter(axes[0, j], data.target, x, f"{what}: TV {tv:.3f}, off 3 sd {off:.3f}")
        if isinstance(data.target, Mixture):
            mode = int(torch.bincount(data.target.nearest(torch.from_numpy(x))[0]).argmax())
            mode = int((data.target.modes == mode).nonzero()[0])
            inside = float(data.target.nearest(torch.from_numpy(x))[1].le(1).float().mean())
            title = f"one mode; {inside:.2f} within 1 sd (target {1 - math.exp(-0.5):.2f})"
            draw_mode_zoom(axes[1, j], data.target, x, mode, title)
    for ax in axes[:, 0]:
        ax.set_ylabel("action 2")
    who = f", seed {data.seeds[0]}" if len(names) > 1 else ""
    figure.suptitle(f"{label}{who}: target (red: 1, 2, 3 sd) and samples (blue)", fontsize=10)
    return figure


def draw_by_step(target: Target, snapshots: dict[int, Array], label: str) -> Figure:
    """Draw the main readout's samples at up to six training steps."""
    steps = sorted(snapshots)
    chosen = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(6, len(steps)))]
    figure, axes = new_figure(1, len(chosen), size=(max(6.0, 2.6 * len(chosen) + 0.4), 3.3), sharey=True)
    for ax, step in zip(axes[0], chosen, strict=True):
        draw_scatter(ax, target, snapshots[step], f"step {step:,}".replace(",", " "))
    axes[0, 0].set_ylabel("action 2")
    figure.suptitle(f"{label}: target (red) and samples (blue) by training step", fontsize=10)
    return figure


def draw_training(data: FigureData, folder: Path, label: str) -> Figure | None:
    """Draw metrics over training, mean and 95 % interval over seeds; None where nothing was logged."""
    path = folder / "metrics.csv"
    if not path.exists():
        return None
    rows, names = read_csv(path), list(data.samples)[:4]
    panels = ["tv", "off3", "off5", "energy_distance", "sliced_w2", "entropy_knn"]
    titles = [
        "total variation of mode weights",
        "share beyond 3 sd",
        "share beyond 5 sd",
        "energy distance",
        "sliced 2-Wasserstein distance",
        "entropy, k-NN (nats)",
    ]
    figure, axes = new_figure(2, 3, size=(10.5, 5.6), sharex=True)
    drawn = False
    for ax, metric, title in zip(axes.flat, panels, titles, strict=True):
        for i, name in enumerate(names):
            at = f"@{name}" if len(data.samples) > 1 else ""
            steps, values = replica_columns(rows, f"eval/{metric}{at}", data.seeds)
            if len(steps) == 0:
                continue
            drawn = True
            band(ax, steps, values, COLOURS[i], readout_label(name))
        ax.set_title(title, fontsize=9)
        if metric.startswith("off"):
            level = data.target.tail_fractions.get(int(metric[3:]), 0.0)
            if level > 0:
                ax.axhline(level, color=GREY, linestyle="--", linewidth=1, label="target")
        if metric == "entropy_knn":
            ax.axhline(data.target.entropy(), color=GREY, linestyle="--", linewidth=1, label="target")
        elif metric == "energy_distance":
            ax.set_yscale("symlog", linthresh=1e-4)  # the estimate has no bias, and may fall below 0
        elif metric == "tv":
            ax.set_ylim(bottom=0)
        else:
            ax.set_yscale("log", nonpositive="clip")
            lowest = min((v for line in ax.lines for v in np.ravel(line.get_ydata()) if v > 0), default=1e-5)
            ax.set_ylim(bottom=lowest / 2)
    if not drawn:
        return None
    for ax in axes[1]:
        ax.set_xlabel("optimiser step")
    axes[1, 2].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{label}: mean and 95 % interval over {len(data.seeds)} seeds", fontsize=10)
    return figure


def draw_modes_chosen(data: FigureData, report: Report, label: str) -> Figure | None:
    """Draw the share of seeds that settled on each mode, and each seed's KL; None where the policy has no ``kl``."""
    if "kl" not in report.metrics:
        return None
    figure, axes = new_figure(1, 2, size=(8.6, 3.6))
    weights = data.target.mode_weights.numpy()
    m, n = len(weights), len(data.seeds)
    chose = np.array([report.metrics[f"chose_mode{i}"] for i in range(m)])
    for i in range(m):
        k = int(chose[i].sum())
        interval = binomtest(k, n).proportion_ci(method="wilson")
        share = k / n
        axes[0, 0].bar(i, share, color=COLOURS[i], width=0.6)
        axes[0, 0].errorbar(i, share, yerr=[[share - interval.low], [interval.high - share]], color="black", capsize=4)
        axes[0, 0].plot([i - 0.38, i + 0.38], [weights[i]] * 2, color=GREY, linestyle="--", linewidth=1.2)
        mine = np.array(report.metrics["kl"])[chose[i] == 1]
        spread = np.linspace(-0.2, 0.2, len(mine)) if len(mine) > 1 else np.zeros(len(mine))
        axes[0, 1].plot(i + spread, mine, "o", color=COLOURS[i], markersize=3.5, alpha=0.7)
        axes[0, 1].plot([i - 0.38, i + 0.38], [-math.log(weights[i])] * 2, color=GREY, linestyle="--", linewidth=1.2)
    ticks = [f"mode {i}\nw = {weights[i]:.3f}" for i in range(m)]
    for ax in axes[0]:
        ax.set_xticks(range(m), ticks)
    axes[0, 0].set_ylabel(f"share of {n} seeds (95 % Wilson)")
    axes[0, 1].set_ylabel("reverse KL at the end (nats)")
    axes[0, 0].plot([], [], color=GREY, linestyle="--", label="weight of the mode")
    axes[0, 1].plot([], [], color=GREY, linestyle="--", label=r"$-\log w$ of the mode")
    for ax in axes[0]:
        ax.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{label}: the mode that each seed settles on", fontsize=10)
    return figure


def draw_all(data: FigureData, report: Report, folder: Path, label: str) -> dict[str, Figure]:
    """Return every figure by file name."""
    out = {"samples": draw_samples(data, report, label)}
    if snapshots := read_snapshots(folder):
        out["by_step"] = draw_by_step(data.target, snapshots, label)
    for name, figure in (
        ("training", draw_training(data, folder, label)),
        ("modes_chosen", draw_modes_chosen(data, report, label)),
    ):
        if figure is not None:
            out[name] = figure
    return out


def compare_figures(runs: dict[str, Path]) -> dict[str, Figure]:
    """Return a figure with the last samples of runs (label to folder) side by side, one mode of each enlarged."""
    last = {}
    for label, folder in runs.items():
        if snapshots := read_snapshots(folder):
            last[label] = snapshots[max(snapshots)]
    if not last:
        return {}
    try:
        targets = {label: load_target(runs[label]) for label in last}
    except ToyError as error:
        note(f"no samples_side_by_side.png: {error}")
        return {}
    names = list(last)[:6]
    figure, axes = new_figure(2, len(names), size=(2.9 * len(names) + 0.4, 6.2))
    for j, name in enumerate(names):
        target, x = targets[name], last[name]
        draw_scatter(axes[0, j], target, x, name)
        if isinstance(target, Mixture):
            mode = int(torch.bincount(target.nearest(torch.from_numpy(x))[0]).argmax())
            draw_mode_zoom(axes[1, j], target, x, int((target.modes == mode).nonzero()[0]), "the fullest mode")
        else:
            axes[1, j].set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("action 2")
    figure.suptitle("target (red: 1, 2, 3 sd) and samples (blue) after training, one seed of each", fontsize=10)
    return {"samples_side_by_side": figure}


def load_target(folder: Path) -> Target:
    """Return the target that a run folder's config.yaml names, by its full path: it may be somebody's own.

    Raises:
        ToyError: its class cannot be found here.
    """
    data = yaml.safe_load(read_text(folder / "config.yaml", 2**22))["data"]
    node = data["init_args"].get("target") if isinstance(data, dict) else None
    if node is None:
        return ThreeModes()
    name, settings = (node, {}) if isinstance(node, str) else (node["class_path"], node.get("init_args") or {})
    target: Target = load_class(name if "." in name else f"lightning_toys.generative_policy.mixture.{name}")(**settings)
    return target
