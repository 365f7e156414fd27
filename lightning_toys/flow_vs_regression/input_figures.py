"""Figures of predictions from two and more inputs."""

from __future__ import annotations

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from lightning_toys.flow_vs_regression.figure_data import FigureData
from lightning_toys.plotting import COLOURS, GREY, new_figure

MOST_OUTPUTS = 12
MOST_INPUTS = 5


def mean_prediction(data: FigureData) -> np.ndarray:
    """Return the mean prediction (m, D) over replicas and draws, at the points of ``subsample``."""
    prediction = data.subsample()[2]
    return np.asarray(prediction.mean((0, 1)))


def root_mean_square_error(data: FigureData) -> np.ndarray:
    """Return each point's error (m, D): the root of its mean square over replicas and draws."""
    _, truth, prediction = data.subsample()
    return np.asarray(np.sqrt(((prediction - truth) ** 2).mean((0, 1))))


def draw_agreement(data: FigureData, title: str) -> Figure:
    """Draw predictions against what they should be, a panel an output (the first 12), with linear interpolation's."""
    _, truth, prediction = data.subsample()
    seeds = prediction.shape[0]
    dims = min(truth.shape[1], MOST_OUTPUTS)
    columns = min(4, dims)
    rows = -(-dims // columns)
    figure, axes = new_figure(rows, columns, size=(max(4.4, 3.0 * columns), 3.0 * rows + 0.9))
    mean = mean_prediction(data)
    lowest, highest = prediction.mean(1).min(0), prediction.mean(1).max(0)
    for d, ax in enumerate(axes.flat):
        if d >= dims:
            ax.set_visible(False)
            continue
        for row in data.references("linear").values():
            ax.plot(truth[:, d], row[:, d], ".", color=GREY, markersize=3, label="linear interpolation", zorder=1)
        spread = np.stack([mean[:, d] - lowest[:, d], highest[:, d] - mean[:, d]]).clip(0)
        ax.errorbar(
            *(truth[:, d], mean[:, d], spread),
            fmt=".",
            color=COLOURS[0],
            markersize=4,
            elinewidth=0.6,
            alpha=0.7,
            label=f"prediction: mean and range of {seeds} seeds" if seeds > 1 else "prediction",
        )
        ends = [float(truth[:, d].min()), float(truth[:, d].max())]
        ax.plot(ends, ends, color="black", linewidth=0.9, linestyle=(0, (4, 2)), label="equal")
        ax.set_xlabel(f"{data.output_label(d)}, as it is")
        ax.set_ylabel("predicted")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=1 + (columns > 1), loc="outside lower center")
    figure.suptitle(title, fontsize=10)
    return figure


def draw_inputs(data: FigureData, title: str) -> Figure:
    """Draw the first output over the inputs: three maps of two inputs, or pairs of more (the first 5)."""
    return draw_maps(data, title) if data.c.shape[1] == 2 else draw_pairs(data, title)


def draw_maps(data: FigureData, title: str) -> Figure:
    """Draw the first output over two inputs: as it is, as predicted, and the error."""
    c, truth = data.c[:: data.stride].numpy(), data.subsample()[1][:, 0]
    predicted, error = mean_prediction(data)[:, 0], root_mean_square_error(data)[:, 0]
    figure, axes = new_figure(1, 3, size=(11.0, 3.6), sharex=True, sharey=True)
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    panels = (
        ("as it is", truth, "cividis", low, high),
        ("predicted, mean over seeds", predicted, "cividis", low, high),
        ("root mean square error over seeds", error, "magma_r", 0.0, None),
    )
    for ax, (name, values, colours, least, most) in zip(axes[0], panels, strict=True):
        drawn = ax.scatter(c[:, 0], c[:, 1], c=values, cmap=colours, vmin=least, vmax=most, s=14, linewidths=0)
        figure.colorbar(drawn, ax=ax)
        ax.set_title(f"{data.output_label(0)}: {name}", fontsize=8)
        ax.set_xlabel(data.input_label(0))
    axes[0, 0].set_ylabel(data.input_label(1))
    figure.suptitle(title, fontsize=10)
    return figure


def draw_pairs(data: FigureData, title: str) -> Figure:
    """Draw the first output over each pair of inputs: above the diagonal predicted, below it the error, which the
    diagonal has over each input alone.
    """
    c = data.c[:: data.stride].numpy()
    predicted, error = mean_prediction(data)[:, 0], root_mean_square_error(data)[:, 0]
    count = min(c.shape[1], MOST_INPUTS)
    drawn: dict[str, PathCollection] = {}
    figure, axes = new_figure(count, count, size=(2.2 * count + 1.6, 2.0 * count + 0.6))
    for i in range(count):
        for j in range(count):
            ax = axes[i, j]
            ax.tick_params(labelsize=6)
            if i == j:
                ax.plot(c[:, i], error, ".", color=COLOURS[1], markersize=3)
                ax.set_ylabel(f"{data.output_label(0)}, error", fontsize=7)
            elif j > i:
                drawn["predicted"] = ax.scatter(c[:, j], c[:, i], c=predicted, cmap="cividis", s=6, linewidths=0)
            else:
                drawn["error"] = ax.scatter(c[:, j], c[:, i], c=error, cmap="magma_r", vmin=0, s=6, linewidths=0)
            if i == count - 1:
                ax.set_xlabel(data.input_label(j), fontsize=8)
            if (j == 0 and i > 0) or j == i + 1:  # the diagonal's vertical axis is the error
                ax.set_ylabel(data.input_label(i), fontsize=8)
    figure.colorbar(drawn["predicted"], ax=axes[: max(1, count // 2)], label=f"{data.output_label(0)}, predicted")
    figure.colorbar(
        drawn["error"], ax=axes[max(1, count // 2) :], label=f"{data.output_label(0)}, root mean square error"
    )
    figure.suptitle(title, fontsize=10)
    return figure
