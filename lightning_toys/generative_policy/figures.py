"""Figures of samples over the target's contours, of one mode enlarged, and of metrics over training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from lightning_toys.errors import ToyError, note, require
from lightning_toys.generative_policy.couplings import Coupling
from lightning_toys.generative_policy.data import MixtureData
from lightning_toys.generative_policy.panels import (
    BLUE,
    axis_pairs,
    draw_contours,
    draw_mode_zoom,
    draw_scatter,
    pairs_left_out,
    red_words,
    say,
    share_band,
)
from lightning_toys.generative_policy.samplers import Sampler
from lightning_toys.generative_policy.target import Target
from lightning_toys.imports import load_class
from lightning_toys.plotting import ACROSS, GREY, band, blocks, new_figure, nth_colour
from lightning_toys.training.files import make_folder, read_text, set_aside, whole_file
from lightning_toys.training.metrics_reader import read_csv, replica_columns
from lightning_toys.training.results import Report
from lightning_toys.training.results_format import read_results

Array = NDArray[np.float64]
__all__ = ["BLUE", "FigureData", "compare_figures", "draw_all", "draw_contours", "read_snapshots", "save_snapshot"]
SNAPSHOTS = "samples"  # folder of a run that keeps samples by training step
SHOWN = 2000  # reference samples
MOST_NAMED = 8  # modes that have a name below an axis


@dataclass
class FigureData:
    """What the figures of an evaluation are drawn from.

    Attributes:
        target: the target distribution.
        samples: readout to samples (R, n, D).
        seeds: the replicas' seeds.
        count: samples of which each metric is.
        reference: samples of the target (m, D), shown where no density is known.
    """

    target: Target
    samples: dict[str, Tensor]
    seeds: Sequence[int]
    count: int = 20_000
    reference: Tensor | None = None

    @property
    def shown(self) -> Tensor | None:
        """Some of the reference samples."""
        return None if self.reference is None else self.reference[:SHOWN]


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
    """Return the samples (n, D) that :func:`save_snapshot` wrote, by training step."""
    out = {}
    for path in sorted((folder / SNAPSHOTS).glob("step_*.npy")):
        word = path.stem.removeprefix("step_")
        if word.isdigit() and path.is_file():  # not those set aside
            out[int(word)] = np.load(path, allow_pickle=False)
    return out


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
    """Draw the first readouts' samples by pairs of coordinates, and in the plane one mode enlarged."""
    names = list(data.samples)[:ACROSS]
    # a policy with one readout shows some seeds in place of readouts
    seeds = range(min(ACROSS, len(data.seeds)))
    columns = [(n, 0) for n in names] if len(names) > 1 else [(names[0], r) for r in seeds]
    target = data.target
    pairs, zoom = axis_pairs(target.dim), target.dim == 2 and target.has_modes
    rows = len(pairs) + zoom
    figure, axes = new_figure(rows, len(columns), size=(3.1 * len(columns) + 0.4, 3.2 * rows + 0.3))
    share = share_within_one(data) if zoom else math.nan
    for j, (name, r) in enumerate(columns):
        x = data.samples[name][r].numpy()
        at = f"@{name}" if len(names) > 1 else ""
        numbers = metric_words({k: report.metrics[f"{k}{at}"][r] for k in WORDS if f"{k}{at}" in report.metrics}, 3)
        what = readout_label(name) if len(names) > 1 else f"seed {data.seeds[r]}"
        for i, pair in enumerate(pairs):
            draw_scatter(axes[i, j], target, x, f"{what}: {numbers}" if i == 0 else "", pair, data.shown)
        if zoom:
            inside = float(target.nearest(torch.from_numpy(x))[1].le(1).float().mean())
            wanted = "" if math.isnan(share) else f" (target {share:.2f})"
            draw_mode_zoom(axes[1, j], target, x, f"one mode; {inside:.2f} within 1 sd{wanted}")
    who = f", seed {data.seeds[0]}" if len(names) > 1 else ""
    red = red_words(target)
    figure.suptitle(f"{label}{who}: {red} and samples (blue){pairs_left_out(target.dim)}", fontsize=10)
    return figure


def share_within_one(data: FigureData) -> float:
    """Return :meth:`Target.share_within` of 1, of a target without samples of its own from the reference samples."""
    share = data.target.share_within(1)
    if math.isnan(share) and data.reference is not None:
        share = float(data.target.nearest(data.reference)[1].le(1).double().mean())
    return share


WORDS = {"tv": "TV", "off3": "off 3 sd", "sliced_w2": "SW2", "energy_distance": "energy"}


def metric_words(metrics: dict[str, float], digits: int) -> str:
    """Return the first two of a policy's metrics in words.

    >>> metric_words({"tv": 0.0123, "off3": 0.5, "sliced_w2": 1.0}, 3)
    'TV 0.012, off 3 sd 0.500'
    """
    return ", ".join(f"{WORDS[k]} {v:.{digits}f}" for k, v in list(metrics.items())[:2])


def steps_left_out(steps: Sequence[int], chosen: Sequence[int]) -> str:
    """Return a remark on the evaluations that a figure leaves out, or nothing.

    >>> steps_left_out([100, 200, 300], [100, 300]), steps_left_out([100], [100])
    ('; not shown: step 200', '')
    """
    left = [f"{s:,}".replace(",", " ") for s in steps if s not in chosen]
    if not left:
        return ""
    more = f" and {len(left) - 6} others" if len(left) > 6 else ""
    return f"; not shown: step{'s' if len(left) > 1 else ''} {', '.join(left[:6])}{more}"


def draw_by_step(target: Target, snapshots: dict[int, Array], label: str, reference: Tensor | None = None) -> Figure:
    """Draw the main readout's samples at up to six training steps, by pairs of coordinates."""
    steps = sorted(snapshots)
    chosen = [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(6, len(steps)))]
    pairs = axis_pairs(target.dim)
    figure, panels = blocks(len(chosen), len(pairs), 2.9)
    for j, step in enumerate(chosen):
        for i, pair in enumerate(pairs):
            draw_scatter(panels[j][i], target, snapshots[step], f"step {step:,}".replace(",", " "), pair, reference)
            if j % ACROSS:
                panels[j][i].set_ylabel("")
    remark = f"{pairs_left_out(target.dim)}{steps_left_out(steps, chosen)}"
    red = red_words(target, "red")
    figure.suptitle(f"{label}: {red} and samples (blue) by training step{remark}", fontsize=10)
    return figure


def draw_training(data: FigureData, folder: Path, label: str) -> Figure | None:
    """Draw metrics over training, mean and 95 % interval over seeds; None where nothing was logged."""
    path = folder / "metrics.csv"
    if not path.exists():
        return None
    rows, names = read_csv(path), list(data.samples)[:4]
    panels = {
        "tv": "total variation of mode weights",
        "off3": "share beyond 3 sd",
        "off5": "share beyond 5 sd",
        "energy_distance": "energy distance",
        "sliced_w2": "sliced 2-Wasserstein distance",
        "entropy_knn": "entropy, k-NN (nats)",
    }
    if not data.target.has_modes:
        panels = {k: v for k, v in panels.items() if k != "tv" and not k.startswith("off")}
    n = len(panels) // 3
    figure, axes = new_figure(n, 3, size=(10.5, 2.6 * n + 0.4), sharex=True)
    drawn = False
    for ax, (metric, title) in zip(axes.flat, panels.items(), strict=True):
        ax.set_title(title, fontsize=9)
        here = False
        for i, name in enumerate(names):
            at = f"@{name}" if len(data.samples) > 1 else ""
            steps, values = replica_columns(rows, f"eval/{metric}{at}", data.seeds)
            if len(steps) == 0:
                continue
            here = drawn = True
            if metric == "tv" or metric.startswith("off"):
                count = math.inf if metric == "tv" else data.count
                share_band(ax, steps, values, count, nth_colour(i), readout_label(name))
            else:
                band(ax, steps, values, nth_colour(i), readout_label(name))
        if not here:
            say(ax, f"no {metric} in metrics.csv")
            continue
        if metric.startswith("off"):
            level = data.target.tail_fractions.get(int(metric[3:]), 0.0)
            if level > 0:
                ax.axhline(level, color=GREY, linestyle="--", linewidth=1, label="target")
        if metric == "entropy_knn":
            if math.isfinite(level := data.target.entropy()):
                ax.axhline(level, color=GREY, linestyle="--", linewidth=1, label="target")
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
    for ax in axes[-1]:
        ax.set_xlabel("optimiser step")
    shown = [ax for ax in axes.flat if ax.get_legend_handles_labels()[1]]
    max(shown, key=lambda ax: len(ax.get_legend_handles_labels()[1])).legend(frameon=False, fontsize=8)
    figure.suptitle(f"{label}: mean and 95 % interval over {len(data.seeds)} seeds", fontsize=10)
    return figure


def draw_modes_chosen(data: FigureData, report: Report, label: str) -> Figure | None:
    """Draw the share of seeds that settled on each mode, and each seed's KL; None where there is no ``kl`` of modes."""
    if "kl_gap" not in report.metrics:
        return None
    figure, axes = new_figure(1, 2, size=(8.6, 3.6))
    weights, inside = data.target.mode_weights.numpy(), data.target.weights_inside().numpy()
    m, n = len(weights), len(data.seeds)
    chose = np.array([report.metrics[f"chose_mode{i}"] for i in range(m)])
    for i in range(m):
        k = int(chose[i].sum())
        interval = binomtest(k, n).proportion_ci(method="wilson")
        share = k / n
        axes[0, 0].bar(i, share, color=nth_colour(i), width=0.6)
        axes[0, 0].errorbar(i, share, yerr=[[share - interval.low], [interval.high - share]], color="black", capsize=4)
        axes[0, 0].plot([i - 0.38, i + 0.38], [weights[i]] * 2, color=GREY, linestyle="--", linewidth=1.2)
        mine = np.array(report.metrics["kl"])[chose[i] == 1]
        spread = np.linspace(-0.2, 0.2, len(mine)) if len(mine) > 1 else np.zeros(len(mine))
        axes[0, 1].plot(i + spread, mine, "o", color=nth_colour(i), markersize=3.5, alpha=0.7)
        if inside[i] > 0:  # no policy comes near a mode that is out of reach
            axes[0, 1].plot([i - 0.38, i + 0.38], [-math.log(inside[i])] * 2, color=GREY, linestyle="--", linewidth=1.2)
    for ax in axes[0]:
        if m <= MOST_NAMED:
            ax.set_xticks(range(m), [f"mode {i}\nw = {weights[i]:.3f}" for i in range(m)])
        else:  # their names would lie on each other
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_xlabel("mode")
    axes[0, 0].set_ylabel(f"share of {n} seeds (95 % Wilson)")
    axes[0, 1].set_ylabel("reverse KL at the end (nats)")
    axes[0, 0].plot([], [], color=GREY, linestyle="--", label="weight of the mode")
    axes[0, 1].plot([], [], color=GREY, linestyle="--", label=r"$-\log$ of the weight in $[-1, 1]^D$")
    for ax in axes[0]:
        ax.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{label}: the mode that each seed settles on", fontsize=10)
    return figure


def draw_all(data: FigureData, report: Report, folder: Path, label: str) -> dict[str, Figure]:
    """Return every figure by file name."""
    out = {"samples": draw_samples(data, report, label)}
    if snapshots := read_snapshots(folder):
        out["by_step"] = draw_by_step(data.target, snapshots, label, data.shown)
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
        data = {label: load_data(runs[label]) for label in last}
    except ToyError as error:
        note(f"no samples_side_by_side.png: {error}")
        return {}
    numbers = {label: run_numbers(runs[label]) for label in last}
    return {"samples_side_by_side": draw_side_by_side(last, data, numbers)}


def draw_side_by_side(
    samples: Mapping[str, np.ndarray], data: Mapping[str, MixtureData], numbers: Mapping[str, str]
) -> Figure:
    """Draw samples (n, D) of up to six policies by label, each above its fullest mode.

    Args:
        samples: one seed's actions.
        data: where each policy's target is.
        numbers: a line below each label.
    """
    names = list(samples)[:6]
    targets = {name: data[name].target for name in names}
    zooms = any(targets[n].dim == 2 and targets[n].has_modes for n in names)
    rows = max(1 + zooms, *(len(axis_pairs(targets[n].dim)) for n in names))
    figure, panels = blocks(len(names), rows, 2.9)
    for j, name in enumerate(names):
        target, x = targets[name], samples[name]
        pairs, few = axis_pairs(target.dim), len(axis_pairs(target.dim)) < rows
        # of a density samples would have to be drawn first
        reference = data[name].reference(0, SHOWN) if target.has_samples else None
        for i in range(rows):
            if i < len(pairs):
                title = f"{name}\n{numbers[name]}" if i == 0 else ""
                draw_scatter(panels[j][i], target, x, title, pairs[i], reference)
            elif few and i == 1 and target.dim == 2:
                draw_mode_zoom(panels[j][i], target, x, "the fullest mode")
            else:
                say(panels[j][i], f"{target.dim} coordinate{'s' if target.dim > 1 else ''}: no other pair")
    red = " or\n".join(dict.fromkeys(red_words(targets[n]) for n in names))
    figure.suptitle(f"{red} and samples (blue) after training, one seed of each", fontsize=10)
    return figure


def run_numbers(folder: Path) -> str:
    """Return the total variation and share beyond 3 sd that a run's results.json has, means over its seeds.

    Of a target without modes its distances.
    """
    path = folder / "results.json"
    if not path.exists():
        return "no results.json"
    return results_in_words(read_results(path))


def results_in_words(found: Mapping[str, Any]) -> str:
    """Return what :func:`run_numbers` does of the content of a results.json: its ``metrics`` and ``seeds``."""
    values = {k: float(np.mean(found["metrics"][k]["values"])) for k in WORDS if k in found["metrics"]}
    return f"{metric_words(values, 4)} ({len(found['seeds'])} seeds)"


def load_target(folder: Path) -> Target:
    """Return the target of a run's data, see :func:`load_data`."""
    return load_data(folder).target


def load_data(folder: Path) -> MixtureData:
    """Return the data module that a run folder's config.yaml names, and its classes, by full path or exported name.

    Raises:
        ToyError: a class cannot be found here, or a file that it reads.
    """
    node = yaml.safe_load(read_text(folder / "config.yaml", 2**22))["data"]
    data: MixtureData = made(node if isinstance(node, dict) else {"class_path": node}, (MixtureData,))
    return data


def made(node: Any, kinds: tuple[type, ...] = (Target, Coupling, Sampler)) -> Any:
    """Return what a node of a configuration stands for: an object where it names a class, or else the node itself.

    Raises:
        ToyError: there is no such class, or it is none of these kinds: nothing else is called.
    """
    if not (isinstance(node, dict) and "class_path" in node):
        return node
    name = node["class_path"]
    kind = load_class(name if "." in name else f"lightning_toys.generative_policy.{name}")
    require(isinstance(kind, type) and issubclass(kind, kinds), f"config.yaml: {name} is no {kinds[0].__name__}")
    return kind(**{key: made(value) for key, value in (node.get("init_args") or {}).items()})
