"""Figures of a run: predictions, errors, training curves, geometry, samplers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_toys.flow_vs_regression.figure_data import FigureData
from lightning_toys.flow_vs_regression.input_figures import draw_agreement, draw_inputs
from lightning_toys.flow_vs_regression.metrics import principal_axes
from lightning_toys.flow_vs_regression.targets import Piecewise, Projected, Rotation
from lightning_toys.plotting import COLOURS, GREY, MARKERS, band, error_bars, new_figure
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.training.results import Report


def draw_curve(ax: Axes, data: FigureData, d: int, legend: bool) -> None:
    """Draw output d: truth, training points, each replica (the first 16), and the mean with its interval."""
    c, truth, prediction = data.subsample()
    mean = prediction[..., d].mean(1)
    for row in mean[:16]:
        ax.plot(c, row, color=COLOURS[0], alpha=0.18, linewidth=0.7)
    if data.target is None:  # rows of a table, with their noise
        ax.plot(c, truth[:, d], "x", color="black", markersize=4, label="test rows")
    else:
        ax.plot(c, truth[:, d], color="black", linewidth=1.1, label="truth", linestyle=(0, (4, 2)))
    band(ax, c, mean, COLOURS[0], f"prediction, mean and 95 % CI of {mean.shape[0]} seeds")
    ax.plot(data.train_c, data.train_x1[:, d], ".", color=COLOURS[1], markersize=5, label="training points")
    ax.set_xlabel(data.input_label(0))
    ax.set_ylabel(data.output_label(d))
    if legend:
        ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.15))


def draw_predictions(data: FigureData, title: str) -> Figure:
    """Draw predictions against truth, first output."""
    figure, axes = new_figure(size=(7.2, 4.2))
    draw_curve(axes[0, 0], data, 0, legend=True)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_per_dimension(data: FigureData, title: str) -> Figure:
    """Draw predictions against truth, a panel an output (the first 24)."""
    dims = min(data.truth.shape[1], 24)
    columns = min(4, dims)
    rows = -(-dims // columns)
    figure, axes = new_figure(rows, columns, size=(3.0 * columns, 1.9 * rows + 0.5), sharex=True)
    for d, ax in enumerate(axes.flat):
        if d >= dims:
            ax.set_visible(False)
            continue
        draw_curve(ax, data, d, legend=False)
        if d < dims - columns:
            ax.set_xlabel("")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    figure.suptitle(title, fontsize=10)
    return figure


def draw_errors(data: FigureData, title: str) -> Figure:
    """Draw the distance to the truth against c, log scale, with linear interpolation's."""
    c, truth, prediction = data.subsample()
    error = np.sqrt(((prediction - truth) ** 2).mean(1).sum(-1))
    figure, axes = new_figure(size=(7.2, 3.8))
    ax = axes[0, 0]
    top = error.max()
    for row in data.references("linear").values():
        linear = np.linalg.norm(row - truth, axis=-1)
        ax.semilogy(c, np.maximum(linear, 1e-12), color=GREY, linewidth=0.8, label="linear interpolation")
        top = max(top, linear.max())
    floor = max(float(np.median(error)) * 1e-3, 1e-12)
    for row in error[:16]:
        ax.semilogy(c, np.maximum(row, floor), color=COLOURS[0], alpha=0.15, linewidth=0.6)
    typical = np.exp(np.log(np.maximum(error, floor)).mean(0))
    ax.semilogy(c, typical, color=COLOURS[0], linewidth=1.5, label=f"geometric mean of {error.shape[0]} seeds")
    ax.plot(data.train_c, np.full(len(data.train_c), floor), "|", color=COLOURS[1], label="training points")
    ax.set_ylim(floor * 0.7, top * 2)
    ax.set_xlabel(data.input_label(0))
    ax.set_ylabel("|prediction - truth|")
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    figure.suptitle(title, fontsize=10)
    return figure


def draw_error_distribution(data: FigureData, title: str) -> Figure:
    """Draw the empirical distribution function of the error, one curve a seed."""
    _, truth, prediction = data.subsample()
    error = np.sqrt(((prediction - truth) ** 2).sum(-1))
    figure, axes = new_figure(size=(6.0, 3.8))
    ax = axes[0, 0]
    for i, row in enumerate(error[:16]):
        x = np.sort(np.maximum(row.ravel(), 1e-12))
        label = f"each of {error.shape[0]} seeds" if i == 0 else None
        ax.semilogx(x, np.linspace(0, 1, x.size), color=COLOURS[0], alpha=0.45, linewidth=1.0, label=label)
    for (name, row), colour in zip(data.references("nearest", "linear").items(), COLOURS[1:], strict=False):
        x = np.sort(np.maximum(np.linalg.norm(row - truth, axis=-1), 1e-12))
        ax.semilogx(x, np.linspace(0, 1, x.size), color=colour, linestyle="--", linewidth=1.2, label=name)
    ax.set_xlim(left=float(np.quantile(error, 0.005)) / 3 + 1e-12)
    ax.set_xlabel("error |prediction - truth|")
    ax.set_ylabel("share of points at or below")
    ax.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_training_curves(csv_path: Path, title: str) -> Figure | None:
    """Draw training loss and evaluation errors against the step; None where nothing was logged.

    Geometric mean over seeds; the band is one standard deviation of the logarithm.
    """
    if not csv_path.exists():
        return None
    rows = read_csv(csv_path)

    def columns(name: str) -> tuple[np.ndarray, np.ndarray]:
        seeds = [k for k in (rows[0] if rows else {}) if k.startswith(f"replicas/{name}/seed_")] or [name]
        kept = [r for r in rows if r.get(seeds[0])]
        steps = np.array([int(r["step"]) for r in kept])
        return steps, np.array([[float(r[k]) for r in kept] for k in seeds])

    found = [(n, *columns(n)) for n in ("train/loss", "eval/l2", "holdout/l2") if any(r.get(n) for r in rows)]
    if not found:
        return None
    labels = {"train/loss": "training loss", "eval/l2": "RMSE, evaluation", "holdout/l2": "RMSE, held-out points"}
    figure, axes = new_figure(1, len(found), size=(4.2 * len(found), 3.4))
    for (name, steps, values), ax, colour in zip(found, axes[0], COLOURS, strict=False):
        safe = np.log(np.maximum(values, 1e-30))
        mean, spread = safe.mean(0), safe.std(0)
        ax.plot(steps, np.exp(mean), color=colour, marker="." if len(steps) < 30 else "", linewidth=1.3)
        ax.fill_between(steps, np.exp(mean - spread), np.exp(mean + spread), color=colour, alpha=0.22, linewidth=0)
        ax.set_yscale("log")
        ax.set_xlabel("optimiser step")
        ax.set_ylabel(labels[name])
    figure.suptitle(f"{title}: geometric mean over seeds, band one SD of the log", fontsize=10)
    return figure


def draw_subspace(data: FigureData, report: Report, title: str) -> Figure | None:
    """Draw, for a projected target, predictions in the plane of the true subspace, and their principal spectrum."""
    target = data.target
    if not isinstance(target, Projected):
        return None
    _, truth, prediction = data.subsample()
    figure, axes = new_figure(1, 2, size=(9.0, 3.9))
    basis = target.basis.numpy()
    plane, rest = axes[0]
    if basis.shape[1] >= 2:
        true_xy = truth @ basis[:, :2]
        for i, row in enumerate(prediction[:, 0] @ basis[:, :2]):
            label = "prediction, each seed" if i == 0 else None
            plane.plot(row[:, 0], row[:, 1], color=COLOURS[0], alpha=0.4, linewidth=0.9, label=label)
        plane.plot(true_xy[:, 0], true_xy[:, 1], color="black", linestyle=(0, (4, 2)), linewidth=1.1, label="truth")
        plane.set_xlabel("first axis of the true subspace")
        plane.set_ylabel("second axis")
        plane.legend(frameon=False, fontsize=8)
    _, s = principal_axes(data.prediction)
    share = (s.square() / s.square().sum(-1, keepdim=True)).mean(1).clamp_min(1e-12).numpy()
    error_bars(rest, list(range(1, share.shape[1] + 1)), share, COLOURS[0], "prediction")
    rest.axvline(target.rank + 0.5, color=GREY, linestyle=":", label=f"rank of the truth: {target.rank}")
    rest.set_yscale("log")
    rest.set_xlabel("principal axis")
    rest.set_ylabel("share of variance")
    rest.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_intervals(data: FigureData, report: Report, title: str) -> Figure | None:
    """Draw, for a piecewise target, the interval matrix and the boundary profile of :mod:`.metrics`."""
    target = data.target
    if not isinstance(target, Piecewise):
        return None
    matrix = data.arrays["interval_matrix"].mean(0).numpy()
    figure, axes = new_figure(1, 2, size=(10.4, 4.2), width_ratios=[1.15, 1])
    figure.get_layout_engine().set(wspace=0.08)  # type: ignore[union-attr,call-arg]
    heat_map, line = axes[0]
    heat_map.grid(False)
    image = heat_map.imshow(matrix, cmap="cividis", vmin=0, vmax=1, origin="lower")
    for i in range(target.intervals):
        for j in range(target.intervals):
            colour = "white" if matrix[i, j] < 0.55 else "black"
            heat_map.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=6)
    figure.colorbar(image, ax=heat_map, label="share of f off the subspace")
    heat_map.set_xticks(range(target.intervals))
    heat_map.set_yticks(range(target.intervals))
    heat_map.set_xlabel("projector j")
    heat_map.set_ylabel("interval i of the prediction")
    profile = data.arrays["boundary_profile"].numpy()
    x = [i / target.intervals for i in range(1, target.intervals)]
    error_bars(line, x, profile, COLOURS[0], "")
    line.set_title(f"mean and 95 % interval over {profile.shape[0]} seeds", fontsize=8)
    line.set_ylim(0, 1.05 * line.get_ylim()[1])
    line.set_xlabel("boundary at c")
    line.set_ylabel("share off span[left, right] near it")
    figure.suptitle(title, fontsize=10)
    return figure


def draw_rotation(data: FigureData, report: Report, title: str) -> Figure | None:
    """Draw, for a rotation, each component's cosine with the true direction and its perpendicular fraction."""
    if not isinstance(data.target, Rotation):
        return None
    figure, axes = new_figure(1, 2, size=(9.0, 3.6))
    alpha = data.target.alpha.tolist()
    label = f"mean and 95 % CI of {data.prediction.shape[0]} seeds"
    error_bars(axes[0, 0], alpha, 1 - data.arrays["rotation_cosine"].clamp(max=1 - 1e-12).numpy(), COLOURS[0], label)
    axes[0, 0].set_ylabel("1 - |cos(prediction, direction)|")
    error_bars(axes[0, 1], alpha, data.arrays["rotation_perpendicular"].numpy(), COLOURS[1], label)
    axes[0, 1].set_ylabel("share of f across the direction")
    for ax in axes[0]:
        ax.set_yscale("log")
        ax.set_xlabel("angular speed of the component")
        ax.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_samplers(data: FigureData, report: Report, title: str) -> Figure | None:
    """Draw the RMSE of every readout of one checkpoint, from zeros and from Gaussian draws."""
    names = [k.removeprefix("l2@") for k in report.metrics if k.startswith("l2@")]
    if len(names) < 2:
        return None
    distributions = list(dict.fromkeys(n.split("/")[0] for n in names))
    readouts = list(dict.fromkeys(n.split("/")[1] for n in names))
    figure, axes = new_figure(size=(max(4.5, 0.75 * len(readouts) + 2.5), 3.8))
    ax = axes[0, 0]
    for i, distribution in enumerate(distributions):
        rows = np.array([report.metrics[f"l2@{distribution}/{r}"] for r in readouts]).T
        x = [k + 0.16 * (i - (len(distributions) - 1) / 2) for k in range(len(readouts))]
        error_bars(ax, x, rows, COLOURS[i], f"x0 {distribution}", MARKERS[i])
    for line in ax.lines:
        line.set_linestyle("")
    for k, name in enumerate(n for n in ("nearest", "linear") if n in report.references):
        ax.axhline(report.references[name]["l2"], color=GREY, linestyle=("--", ":")[k], label=name, linewidth=1.0)
    ax.set_yscale("log")
    ax.set_xticks(range(len(readouts)), readouts, rotation=30)
    ax.set_ylabel(f"RMSE, mean and 95 % CI of {len(report.seeds)} seeds")
    ax.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.13))
    figure.suptitle(title, fontsize=10)
    return figure


def draw_all(data: FigureData, report: Report, csv_path: Path, title: str) -> dict[str, Figure]:
    """Return every figure that is defined for the target, by file name."""
    plots: dict[str, Callable[[], Figure | None]] = {
        "error_distribution": lambda: draw_error_distribution(data, title),
        "training_curves": lambda: draw_training_curves(csv_path, title),
        "subspace": lambda: draw_subspace(data, report, title),
        "boundaries": lambda: draw_intervals(data, report, title),
        "rotation": lambda: draw_rotation(data, report, title),
        "samplers": lambda: draw_samplers(data, report, title),
    }
    if data.c.shape[1] == 1:
        plots["predictions"] = lambda: draw_predictions(data, title)
        plots["errors"] = lambda: draw_errors(data, title)
        if data.truth.shape[1] > 1:
            plots["per_dimension"] = lambda: draw_per_dimension(data, title)
    else:
        plots["predictions"] = lambda: draw_agreement(data, title)
        plots["surface" if data.c.shape[1] == 2 else "pairs"] = lambda: draw_inputs(data, title)
    return {name: figure for name, make in plots.items() if (figure := make()) is not None}
