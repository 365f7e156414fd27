"""Figures of the plane with four goals: trajectories, and entropies by state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from lightning_toys.generative_policy.figures import BLUE
from lightning_toys.generative_policy.multigoal import GOALS, MultiGoal
from lightning_toys.generative_policy.multigoal_optimum import play_optimal
from lightning_toys.plotting import ACROSS, blocks, new_figure
from lightning_toys.training.results_format import read_results

RED = "#B40426"


@dataclass
class FigureData:
    """What the figures of an evaluation are drawn from.

    Attributes:
        problem: the plane and its goals.
        trajectories: states of the first replica's episodes (n, T + 1, 2).
        entropy: entropies of the first replica by state (k, k) at the first step, in nats, the first coordinate along
            the first axis.
        optimal_entropy: the optimum's, likewise.
    """

    problem: MultiGoal
    trajectories: Tensor
    entropy: Tensor
    optimal_entropy: Tensor


def draw_trajectories(ax: Axes, trajectories: np.ndarray, title: str, width: float | None = None) -> None:
    """Draw episodes (n, T + 1, 2) over the goals, with circles of two widths around them where it is known."""
    for x, y in GOALS:
        ax.plot([x], [y], "x", color=RED, markersize=7)
        if width is not None:
            ax.add_patch(Circle((x, y), 2 * width, fill=False, edgecolor=RED, linewidth=0.8))
    for path in trajectories:
        ax.plot(path[:, 0], path[:, 1], "-", color=BLUE, linewidth=0.7, alpha=0.5)
    ax.plot(trajectories[:, -1, 0], trajectories[:, -1, 1], ".", color=BLUE, markersize=4)
    ax.set_xlim(-1.05, 1.05)
    ax.set_ylim(-1.05, 1.05)
    ax.set_aspect("equal")
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("state 1")


def draw_episodes(data: FigureData, optimal: Tensor, label: str) -> Figure:
    """Draw a policy's episodes beside the optimum's, and both entropies by state at the first step."""
    figure, axes = new_figure(2, 2, size=(7.6, 7.2))
    draw_trajectories(axes[0, 0], data.trajectories.numpy(), f"{label}: episodes", data.problem.width)
    draw_trajectories(axes[0, 1], optimal.numpy(), "soft optimum: episodes", data.problem.width)
    low = float(min(data.entropy.min(), data.optimal_entropy.min()))
    high = float(max(data.entropy.max(), data.optimal_entropy.max()))
    for ax, values, title in (
        (axes[1, 0], data.entropy, f"{label}: entropy by state, step 0"),
        (axes[1, 1], data.optimal_entropy, "soft optimum: entropy by state, step 0"),
    ):
        half = 0.9 * (1 + 1 / (len(values) - 1))
        shown = ax.imshow(values.T.numpy(), origin="lower", extent=(-half, half, -half, half), vmin=low, vmax=high)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("state 1")
        figure.colorbar(shown, ax=ax, label="nats", shrink=0.8)
    for ax in axes[:, 0]:
        ax.set_ylabel("state 2")
    return figure


def draw_all(data: FigureData, label: str) -> dict[str, Figure]:
    """Return every figure by file name."""
    start = data.trajectories[:, 0]
    states = play_optimal(data.problem, start)[0].transpose(0, 1)
    return {"episodes": draw_episodes(data, states, label)}


def compare_figures(runs: dict[str, Path]) -> dict[str, Figure]:
    """Return the episodes of runs (label to folder) side by side, one seed of each."""
    kept = {}
    for label, folder in runs.items():
        if (folder / "results.json").exists():
            found = read_results(folder / "results.json")["arrays"].get("trajectories")
            if found:
                kept[label] = torch.tensor(found).numpy()
    return {"episodes_side_by_side": draw_side_by_side(kept)} if kept else {}


def draw_side_by_side(kept: dict[str, np.ndarray]) -> Figure:
    """Draw the episodes (n, T + 1, 2) of up to six runs, by label."""
    names = list(kept)[:6]
    figure, panels = blocks(len(names))
    for k, ((ax,), name) in enumerate(zip(panels, names, strict=True)):
        draw_trajectories(ax, kept[name], name)
        if k % ACROSS == 0:
            ax.set_ylabel("state 2")
    figure.suptitle("episodes of one seed of each", fontsize=10)
    return figure
