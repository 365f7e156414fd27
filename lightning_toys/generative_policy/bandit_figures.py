"""Figures of the bandit: actions at some states, and regret over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_toys.generative_policy.bandit import RotatingModes
from lightning_toys.generative_policy.figures import BLUE
from lightning_toys.plotting import GREY, band, new_figure, nth_colour
from lightning_toys.training.metrics_reader import read_run, replica_columns
from lightning_toys.training.results_format import read_results


@dataclass
class FigureData:
    """What the figures of an evaluation are drawn from.

    Attributes:
        bandit: the reward.
        states: the evaluated states (S, n, 2), each repeated n times.
        actions: the policy's actions (R, S, n, 2).
    """

    bandit: RotatingModes
    states: Tensor
    actions: Tensor


def draw_actions(data: FigureData, label: str) -> Figure:
    """Draw the first replica's actions at four states over the reward's contours."""
    indices = [round(i * len(data.states) / 4) for i in range(4)]
    figure, axes = new_figure(2, 2, size=(7.4, 7.2), sharex=True, sharey=True)
    line = torch.linspace(-1, 1, 200, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    for ax, i in zip(axes.flat, indices, strict=True):
        state = data.states[i, 0]
        reward = data.bandit.reward(state.expand_as(grid), grid)
        levels = [0.2, 0.4, 0.6, 0.75, 0.85, 0.95]
        lines = ax.contour(line, line, reward, levels=levels, colors="#B40426", linewidths=0.8)
        ax.clabel(lines, levels[::2], fontsize=7)
        a = data.actions[0, i].clamp(-1, 1)
        ax.plot(a[:, 0], a[:, 1], ".", color=BLUE, markersize=3, alpha=0.5)
        angle = float(torch.atan2(state[1], state[0])) * 180 / np.pi % 360
        ax.set_title(f"state at {angle:.0f}°", fontsize=9)
        ax.set_aspect("equal")
    for ax in axes[-1]:
        ax.set_xlabel("action 1")
    for ax in axes[:, 0]:
        ax.set_ylabel("action 2")
    figure.suptitle(f"{label}: expected reward (red) and actions (blue) of one seed", fontsize=10)
    return figure


def draw_regret(curves: dict[str, tuple[np.ndarray, np.ndarray]], hills: Mapping[str, Sequence[float]]) -> Figure:
    """Draw regret, and its sum over steps, over training: mean and interval over seeds, dashed lines at lower modes.

    Args:
        curves: label to steps (T,) and regret (R, T).
        hills: label to the regret at the top of each lower mode; where runs differ in it, lines have their colours.
    """
    figure, axes = new_figure(1, 2, size=(10.0, 3.9))
    own = len(set(map(tuple, hills.values()))) > 1
    for i, (name, (steps, values)) in enumerate(curves.items()):
        colour = nth_colour(i)
        band(axes[0, 0], steps, values, colour, f"{name}, {len(values)} seeds")
        widths = np.diff(steps, prepend=0.0)
        band(axes[0, 1], steps, np.cumsum(values * widths, axis=1), colour, name)
        for regret in hills[name] if own or i == 0 else ():
            axes[0, 0].axhline(regret, color=colour if own else GREY, linestyle="--", linewidth=1)
    if any(hills.values()):
        label = "top of a lower hill" + (", each run's own" if own else "")
        axes[0, 0].plot([], [], color=GREY, linestyle="--", label=label)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylabel("expected regret of an action")
    axes[0, 1].set_ylabel("regret summed over steps")
    for ax in axes[0]:
        ax.set_xlabel("optimiser step")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle("regret: mean and 95 % interval over seeds", fontsize=10)
    return figure


def lower_hills(references: Mapping[str, Mapping[str, float | None]]) -> list[float]:
    """Return the regret at the top of each hill but the best, out of a run's baselines."""
    tops = [row.get("regret") for name, row in references.items() if name.startswith("top_of_hill_")]
    return sorted(top for top in tops if top is not None)[1:]


def draw_all(data: FigureData, seeds: Sequence[int], folder: Path, label: str) -> dict[str, Figure]:
    """Return every figure by file name."""
    out = {"actions": draw_actions(data, label)}
    steps, values = replica_columns(read_run(folder), "eval/regret", seeds)
    if len(steps):
        out["regret"] = draw_regret({label: (steps, values)}, {label: lower_hills(data.bandit.baselines)})
    return out


def compare_figures(runs: dict[str, Path]) -> dict[str, Figure]:
    """Return the regret curves of runs (label to folder) in one figure."""
    curves, hills = {}, {}
    for label, folder in runs.items():
        results = folder / "results.json"
        if not results.exists():
            continue
        found = read_results(results)
        steps, values = replica_columns(read_run(folder), "eval/regret", found["seeds"])
        if len(steps):
            curves[label], hills[label] = (steps, values), lower_hills(found["references"])
    return {"regret_curves": draw_regret(curves, hills)} if curves else {}
