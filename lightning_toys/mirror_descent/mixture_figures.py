"""Figures of runs on mixtures: marginals beside the exact ones, error against evaluations, weights of components."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_toys.mirror_descent.closed_form_checks import Row
from lightning_toys.mirror_descent.figures import label_points
from lightning_toys.mirror_descent.joint import Array
from lightning_toys.mirror_descent.sample_figures import KOLMOGOROV
from lightning_toys.mirror_descent.truth import Truth
from lightning_toys.plotting import COLOURS, GREY, literal, new_figure, nth_marker
from lightning_toys.stats import mean_ci

MOST_COORDINATES = 6  # of a figure
FAMILY_COLOURS = (*COLOURS[:7], GREY)  # a yellow line is hard to see


def draw_marginals(truth: Truth, coordinates: Sequence[str], name: str, x: Array, exact: Array, bins: int) -> Figure:
    """Draw each coordinate's marginal: above its density beside the exact one, below the distribution function's error.

    Args:
        truth: the exact distribution.
        coordinates: names of the coordinates.
        name: the sampler's name.
        x: its draws (n, D), of one seed.
        exact: as many exact draws.
        bins: of the histograms.
    """
    shown = list(coordinates)[:MOST_COORDINATES]
    figure, axes = new_figure(2, len(shown), size=(max(6.4, 3.2 * len(shown)), 5.6))
    band = KOLMOGOROV / math.sqrt(len(x))
    q = truth.prior
    for i, label in enumerate(shown):
        above, below = axes[0, i], axes[1, i]
        centre, std = float(truth.mean[i]), math.sqrt(float(truth.covariance[i, i]))
        prior_std = math.sqrt(float(q.covariance[i, i]))
        low = min(centre - 4 * std, float(q.mean[i]) - 3 * prior_std)
        high = max(centre + 4 * std, float(q.mean[i]) + 3 * prior_std)
        above.hist(x[:, i], bins=bins, range=(low, high), density=True, color=COLOURS[0], alpha=0.35, label=name)
        edges = np.linspace(low, high, 301)
        middle, width = 0.5 * (edges[1:] + edges[:-1]), edges[1] - edges[0]
        above.plot(middle, np.diff(truth.cdf(i, edges)) / width, color=COLOURS[1], label="tilted distribution, exact")
        w, m = q.weights, q.means[:, i]
        sd = np.sqrt(q.covariances[:, i, i])
        untilted = w @ (np.exp(-0.5 * ((middle[None] - m[:, None]) / sd[:, None]) ** 2) / sd[:, None])
        above.plot(
            middle,
            untilted / math.sqrt(2 * math.pi),
            color=GREY,
            linestyle="--",
            linewidth=1,
            label="untilted distribution",
        )
        above.set_title(label, fontsize=9)
        below.axhspan(-band, band, color=GREY, alpha=0.2, linewidth=0, label="95 % of exact draws")
        F = truth.cdf(i, edges)
        for points, colour, text in ((exact, GREY, "exact draws"), (x, COLOURS[0], name)):
            found = np.searchsorted(np.sort(points[:, i]), edges, side="right") / len(points)
            below.plot(edges, found - F, color=colour, linewidth=1.2, label=text)
        below.set_xlabel(label)
    axes[0, 0].set_ylabel("density")
    axes[1, 0].set_ylabel("distribution function less exact", fontsize=8)
    for ax in axes[:, 0]:
        ax.legend(frameon=False, fontsize=7)
    left_out = f", {len(shown)} of {len(coordinates)} coordinates" if len(shown) < len(coordinates) else ""
    figure.suptitle(f"{literal(name)}: {len(x)} draws of one seed{left_out}", fontsize=10)
    return figure


def draw_frontier(
    curves: Mapping[str, tuple[Sequence[float], Array]], families: Mapping[str, str], floor: float, title: str
) -> Figure:
    """Draw the error of each sampler's distribution against evaluations, a line a sampler, a colour a family.

    Args:
        curves: evaluations (n,) and errors (R, n) of each sampler.
        families: family of each sampler.
        floor: error of as many exact draws.
        title: what the error is.
    """
    figure, axes = new_figure(size=(9.6, 6.2))
    ax = axes[0, 0]
    kinds = list(dict.fromkeys(families[n] for n in curves))
    ends: list[tuple[float, float, str, str]] = []
    for name, (all_costs, all_rows) in curves.items():
        known = np.isfinite(all_rows).all(0)  # elsewhere draws ran away
        if not known.any():
            continue
        costs, rows = np.array(all_costs)[known], all_rows[:, known]
        k = kinds.index(families[name])
        colour, marker = FAMILY_COLOURS[k % len(FAMILY_COLOURS)], nth_marker(k)
        estimates = [mean_ci(column) for column in np.maximum(rows, 1e-9).T]
        mean = np.array([e.mean for e in estimates])
        half = np.array([0.0 if math.isnan(e.half_width) else e.half_width for e in estimates])
        low = np.minimum(half, 0.9 * mean)
        ax.errorbar(
            costs,
            mean,
            yerr=[low, half],
            color=colour,
            marker=marker,
            markersize=4,
            capsize=2,
            linewidth=1.2,
            alpha=0.85,
        )
        ends.append((float(costs[-1]), float(mean[-1]), literal(name), colour))
    ax.axhline(floor, color=GREY, linestyle=":", linewidth=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    largest = max(max(costs) for costs, _ in curves.values())
    smallest = min(min(costs) for costs, _ in curves.values())
    ax.set_xlim(smallest / 1.6, largest * (largest / smallest) ** 0.45 * 3)
    label_points(ax, ends, gap=0.038)
    for kind in kinds:
        k = kinds.index(kind)
        ax.plot([], [], color=FAMILY_COLOURS[k % len(FAMILY_COLOURS)], marker=nth_marker(k), label=kind)
    ax.plot([], [], color=GREY, linestyle=":", label="exact draws")
    ax.set_xlabel("evaluations of score, Q and refresh to a sample")
    ax.set_ylabel(title, fontsize=8)
    figure.legend(frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    return figure


def draw_modes(rows: Sequence[Row], weights: Array) -> Figure:
    """Draw each sampler's weights of the components with 95 % intervals, beside the exact ones (lines).

    Args:
        rows: of all samplers; those of quantities ``weight 1``, ... are shown.
        weights: the exact weights (J,).
    """
    names = list(dict.fromkeys(r.check.sampler for r in rows))
    figure, axes = new_figure(1, len(weights), size=(2.2 + 2.1 * len(weights), 1.2 + 0.24 * len(names)), sharey=True)
    for j, (ax, weight) in enumerate(zip(axes[0], weights, strict=True)):
        found = {r.check.sampler: r.check for r in rows if r.check.quantity == f"weight {j + 1}"}
        for y, name in enumerate(names):
            c = found[name]
            half = 0.0 if math.isnan(c.standard_error) else 1.96 * c.standard_error
            ax.errorbar(c.estimate, y, xerr=half, color=COLOURS[0], marker="o", markersize=3.5, capsize=2)
        ax.axvline(weight, color=COLOURS[1], linewidth=1.2)
        ax.set_title(f"component {j + 1}: {weight:.3f}", fontsize=9)
        ax.set_xlabel("weight")
    axes[0, 0].set_yticks(range(len(names)), [literal(n) for n in names], fontsize=8)
    axes[0, 0].invert_yaxis()
    return figure
