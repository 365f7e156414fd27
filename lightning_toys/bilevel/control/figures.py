"""Learning curves of one run, and of agents side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_toys.bilevel.curves import draw_seeds
from lightning_toys.plotting import COLOURS, GREY, band, error_bars, new_figure
from lightning_toys.training.files import read_text
from lightning_toys.training.metrics_reader import read_run, replica_columns
from lightning_toys.training.results_format import read_results

AGENTS = ("omd", "funcbo", "mle", "vep", "vaml", "model_free", "lagged")
SUMMARY = "return: mean with 95 % interval; errors: median"
PANELS = (
    ("return", "return, greedy actions"),
    ("td_error", "RMS of d - y"),
    ("model_error", "RMS error of the next state"),
)


def draw_training(folder: Path, seeds: Sequence[int], label: str) -> dict[str, Figure]:
    """Draw return, value error and model error over environment steps: each seed thin, see :func:`draw_metric`.

    Args:
        folder: of the run, with its metrics.csv.
        seeds: one seed a replica.
        label: name of the run.

    Returns:
        Figures by file name; none if nothing was evaluated.
    """
    rows = read_run(folder)
    steps, _ = replica_columns(rows, "eval/return", seeds)
    if not len(steps):
        return {}
    figure, axes = new_figure(1, 3, size=(9.0, 3.2))
    for ax, (name, title), colour in zip(axes[0], PANELS, COLOURS, strict=False):
        steps, values = replica_columns(rows, f"eval/{name}", seeds)
        if not len(steps):
            continue
        draw_metric(ax, title, steps, values, colour, label)
        label_axes(ax, title)
    shown = f"{len(seeds)} seeds thin; {SUMMARY}" if len(seeds) > 1 else "one seed"
    figure.suptitle(f"{label} ({shown})", fontsize=10)
    return {"learning": figure}


def draw_metric(
    ax: Axes, title: str, steps: np.ndarray, values: np.ndarray, colour: str, label: str, place: int | None = None
) -> None:
    """Draw every seed (R, len(steps)) thin, and the mean with its 95 % interval; the median on a logarithmic axis.

    Args:
        ax: the panel.
        title: of the panel; errors have a logarithmic axis.
        steps: of the validations.
        values: of every seed.
        colour: of the run.
        label: of the run.
        place: of the run among others: the interval is then that of the last validation alone, beside the others'.
    """
    if "RMS" in title:
        draw_seeds(ax, steps, values, colour, label)
        return
    if place is not None and len(values) > 1 and len(steps) > 1:
        end = float(steps[-1]) + (0.02 + 0.015 * place) * float(steps[-1] - steps[0])
        error_bars(ax, [end], values[:, -1:], colour, "_interval")
        for curve in values:
            ax.plot(steps, curve, color=colour, alpha=0.25, linewidth=0.7)
        ax.plot(steps, values.mean(0), color=colour, label=label, linewidth=1.6)
        return
    for curve in values if len(values) > 1 else []:
        ax.plot(steps, curve, color=colour, alpha=0.25, linewidth=0.7)
    band(ax, steps, values, colour, label)


def label_axes(ax: Axes, title: str) -> None:
    """Label a panel's axes; errors get a logarithmic axis, returns one from 0 unless some are negative."""
    ax.set_xlabel("environment steps")
    ax.set_ylabel(title)
    if "RMS" in title:
        ax.set_yscale("log")
        return
    curves = [line for line in ax.lines if line.get_linestyle() != "None"]  # and not the ends of error bars
    seen = [y for line in curves for y in np.asarray(line.get_ydata()).tolist()]
    if seen and min(seen) >= 0:  # an interval may reach below what there can be
        ax.set_ylim(0, 1.05 * max(seen) or 1)


def compare_figures(runs: dict[str, Path]) -> dict[str, Figure]:
    """Draw runs side by side: a row of panels for each width of the model, a colour for each agent.

    Args:
        runs: label to run folder; those that are not finished are left out.

    Returns:
        Figures by file name; none if there is no finished run.
    """
    panels: dict[int, dict[str, tuple[str, Path]]] = {}
    for label, folder in runs.items():
        if all((folder / name).exists() for name in ("results.json", "metrics.csv", "config.yaml")):
            settings = yaml.safe_load(read_text(folder / "config.yaml", 2**22))["model"]["init_args"]
            agent = settings["agent"]  # a name, or a class of somebody's own
            name = agent if isinstance(agent, str) else str(agent.get("class_path"))
            panels.setdefault(settings["model_hidden_dim"], {})[label] = (name, folder)
    if not panels:
        return {}
    figure, axes = new_figure(len(panels), 3, size=(9.0, 0.6 + 3.1 * len(panels)))
    for row, (width, cells) in zip(axes, sorted(panels.items()), strict=True):
        agents = [agent for agent, _ in cells.values()]
        random: dict[str, dict[float, tuple[str, str]]] = {m: {} for m, _ in PANELS}  # value to a run's name and colour
        # then its name says all, and it has its colour in every picture
        alone = len(set(agents)) == len(agents) and set(agents) <= set(AGENTS)
        for i, (label, (agent, folder)) in enumerate(cells.items()):
            results = read_results(folder / "results.json")
            seeds, chance = results["seeds"], results["references"].get("random actions", {})
            rows, name = read_run(folder), agent if alone else label
            colour = COLOURS[AGENTS.index(agent) if alone else i % len(COLOURS)]
            for ax, (metric, title) in zip(row, PANELS, strict=True):
                steps, values = replica_columns(rows, f"eval/{metric}", seeds)
                if len(steps):
                    draw_metric(ax, title, steps, values, colour, f"{name}, {len(values)} seeds", i)
                if chance.get(metric) is not None:
                    random[metric].setdefault(chance[metric], (name, colour))
        for ax, (metric, title) in zip(row, PANELS, strict=True):
            several = len(random[metric]) > 1  # environments differ: each run has its own
            for value, (name, colour) in random[metric].items():
                of = f", {name}" if several else ""
                line = colour if several else GREY
                ax.axhline(value, color=line, linestyle="--", linewidth=1, label=f"random actions{of}")
            label_axes(ax, title)
        row[0].set_title(f"model width {width}", fontsize=9, loc="left")
        row[0].legend(frameon=False, fontsize=8)
    figure.suptitle("agents, seeds thin; return: mean, 95 % interval at the end; errors: median", fontsize=10)
    return {"agents": figure}
