"""Figures of runs: error against cost, against refreshes and steps, rank histograms, learned scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from arviz_stats.base import array_stats  # type: ignore[attr-defined]
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats as scipy_stats
from scipy.optimize import isotonic_regression

from lightning_toys.mirror_descent.diagnostics import Array
from lightning_toys.mirror_descent.problem import Settings
from lightning_toys.plotting import COLOURS, GREY, MARKERS, new_figure, nth_colour, nth_marker
from lightning_toys.stats import mean_ci
from lightning_toys.training.noise import keyed_generator

PARAMETERS = {"joint_kl": 5, "action_kl": 2}  # of the Gaussians that are compared


def draw_error_vs_cost(
    metrics: Mapping[str, list[float]],
    costs: Mapping[str, int],
    families: Mapping[str, str],
    seeds: int,
    chains: int,
) -> Figure:
    """Draw the KL to the target against evaluations per sample, all samplers in one figure.

    Args:
        metrics: has ``joint_kl@NAME`` and ``action_kl@NAME`` of each sampler, one value a seed.
        costs: evaluations per sample of each sampler.
        families: family of each sampler, which has one colour.
        seeds: how many there are.
        chains: draws of each.
    """
    figure, axes = new_figure(2, 1, size=(8.4, 9.6), sharex=True)
    kinds = list(dict.fromkeys(families.values()))
    style = {name: (nth_colour(k), nth_marker(k))
             for name, family in families.items() for k in [kinds.index(family)]}  # fmt: skip
    for ax, metric, title in (
        (axes[0, 0], "joint_kl", "KL of (a, s') to the tilted distribution, by moments (nats)"),
        (axes[1, 0], "action_kl", "KL of a alone (nats)"),
    ):
        points: list[tuple[float, float, str, str]] = []
        for name, cost in costs.items():
            colour, marker = style[name]
            values = np.maximum(np.array(metrics[f"{metric}@{name}"]), 1e-12)
            mean, bars = geometric_bars(values[:, None])
            ax.errorbar(cost, mean, yerr=bars, color=colour, marker=marker, capsize=2, markersize=6)
            points.append((float(cost), float(mean[0]), name, colour))
        low, middle, high = exact_draws_geometric(PARAMETERS[metric], seeds, chains)
        ax.axhline(middle, color=GREY, linestyle=":", linewidth=1)
        ax.axhspan(low, high, color=GREY, alpha=0.2, linewidth=0)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("evaluations of score, Q and refresh to a sample")
        ax.set_title(title, fontsize=9)
        ax.set_xlim(min(costs.values()) / 2, max(costs.values()) * 12)
        label_points(ax, points)
    for label in kinds:
        colour, marker = style[next(n for n, family in families.items() if family == label)]
        axes[0, 0].plot([], [], color=colour, marker=marker, linestyle="none", label=label)
    axes[0, 0].plot([], [], color=GREY, linestyle=":", label="exact draws: median and 95 % band")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle("error of the distribution against cost: geometric mean and 95 % interval over seeds", fontsize=10)
    return figure


def exact_draws_geometric(parameters: int, seeds: int, chains: int) -> tuple[float, float, float]:
    """Return 2.5 % quantile, median and 97.5 % quantile of the geometric mean over seeds of exact draws' KL by moments.

    See :func:`exact_draws_kl`; of 20 000 keyed draws of the chi-squared numbers.

    >>> [round(v, 5) for v in exact_draws_geometric(5, 4, 98304)]
    [1e-05, 2e-05, 4e-05]
    """
    draws = keyed_generator(0, seeds, "mirror_descent/exact_draws").chisquare(parameters, (20_000, seeds))
    low, middle, high = np.quantile(np.exp(np.log(draws).mean(1)), [0.025, 0.5, 0.975]) / (2 * chains)
    return float(low), float(middle), float(high)


def geometric_bars(rows: Array) -> tuple[Array, Array]:
    """Return geometric means (n,) over seeds of positive numbers (R, n), and what errorbar takes for 95 % (2, n).

    >>> middle, bars = geometric_bars(np.array([[1.0], [100.0]]))
    >>> middle.round(9).tolist(), bool((bars[0] < middle).all())
    ([10.0], True)
    """
    found = [mean_ci(column) for column in np.log(rows).T]
    half = np.array([0.0 if math.isnan(e.half_width) else e.half_width for e in found])
    mean = np.array([e.mean for e in found])
    middle = np.exp(mean)
    return middle, np.stack([middle - np.exp(mean - half), np.exp(mean + half) - middle])


def exact_draws_kl(parameters: int, seeds: int, chains: int) -> tuple[float, float, float]:
    """Return the 2.5 % quantile, expectation and 97.5 % quantile of the mean over seeds of exact draws' KL by moments.

    Of n draws of a Gaussian 2 n KL is chi-squared, to first order in 1 / n, with a degree of freedom for each of its
    parameters: 2 of one coordinate, 5 of two.

    >>> [round(v, 4) for v in exact_draws_kl(2, 1, 100)]
    [0.0003, 0.01, 0.0369]
    """
    distribution = scipy_stats.chi2(parameters * seeds)
    low, high = distribution.ppf([0.025, 0.975])
    scale = 1 / (2 * chains * seeds)
    return float(low * scale), parameters * seeds * scale, float(high * scale)


def label_points(ax: Axes, points: Sequence[tuple[float, float, str, str]], gap: float = 0.046) -> None:
    """Write the names of points (x, y, name, colour) on logarithmic axes in a column at the right, by their heights."""
    if not points:
        return
    low, high = np.log10(ax.get_ylim())
    ordered = sorted(points, key=lambda p: p[1])
    wanted = np.array([(math.log10(y) - low) / (high - low) for _, y, _, _ in ordered])
    steps = gap * np.arange(len(wanted))
    # the nearest heights that are a gap apart: an isotonic fit, once the gaps are taken off
    heights = isotonic_regression(wanted - steps).x + steps
    heights -= max(0.0, heights[-1] - 0.98)
    heights += max(0.0, 0.02 - heights[0])
    for (x, y, name, colour), up in zip(ordered, heights, strict=True):
        ax.annotate(
            name,
            (x, y),
            xytext=(0.8, up),
            textcoords="axes fraction",
            fontsize=7.5,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 4},
        )


def draw_sweeps(
    curves: Mapping[str, Mapping[str, Mapping[str, Array]]], plans: Mapping[str, Mapping[int, Settings]], floor: float
) -> Figure:
    """Draw KL of action and next state against the knob that is varied, a row a knob.

    Args:
        curves: sampler to knob to metric to values (R, number of settings).
        plans: knob to its values to settings.
        floor: expected KL of exact draws.
    """
    figure, axes = new_figure(len(plans), 2, size=(9.4, 3.6 * len(plans)))
    for row, (knob, plan) in zip(axes, plans.items(), strict=True):
        other = next(k for k in ("action_steps_per_level", "refresh_L") if k != knob)
        stays = f"{other} = {getattr(next(iter(plan.values())), other)}"
        for ax, metric, title in ((row[0], "action_kl", "action"), (row[1], "state_kl", "next state")):
            for i, (name, found) in enumerate(curves.items()):
                rows = np.maximum(found[knob][metric], 1e-9)
                mean, bars = geometric_bars(rows)
                colour, marker = nth_colour(i), nth_marker(i)
                ax.errorbar(list(plan), mean, yerr=bars, color=colour, marker=marker, capsize=3, label=name)
            ax.axhline(floor, color=GREY, linestyle=":", linewidth=1, label="exact draws, on average")
            ax.set_yscale("log")
            ax.set_xticks(list(plan))
            ax.set_xlabel(f"{knob}: {'refreshes' if knob == 'refresh_L' else 'action steps'} at each level")
            ax.set_ylabel("KL (nats), geometric mean, 95 %")
            ax.set_title(f"{title}; {stays} stays", fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside upper center"
    )
    return figure


def draw_score_error(metrics: Mapping[str, list[float]], levels: Sequence[float], seeds: Sequence[int]) -> Figure:
    """Draw the relative error of a learned score against the noise level, a line a seed."""
    figure, axes = new_figure(size=(5.8, 3.8))
    ax = axes[0, 0]
    noise_variance = [1 - abar for abar in levels]
    rows = np.array([metrics[f"score_error@{abar:g}"] for abar in levels])
    for seed, row in zip(seeds, rows.T, strict=True):
        ax.plot(noise_variance, row, color=COLOURS[0], marker=MARKERS[0], markersize=4, alpha=0.6, linewidth=1)
        ax.annotate(
            f"{seed}", (noise_variance[-1], row[-1]), xytext=(4, 0), textcoords="offset points", fontsize=7, va="center"
        )
    ax.axhline(5e-3, color=GREY, linestyle=":", linewidth=1, label=".005")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.invert_xaxis()
    ax.set_xlabel("1 - abar, the share of noise (clean to the right)")
    ax.set_ylabel("relative error of the score")
    ax.set_title("a line a seed", fontsize=9)
    ax.legend(frameon=False, fontsize=8)
    return figure


def draw_learned_vs_exact(
    metrics: Mapping[str, list[float]], names: Sequence[str], exact_suffix: str, floor: float
) -> Figure:
    """Draw each sampler's joint KL with the learned energy beside that with the closed form, every seed a point.

    Args:
        metrics: has ``joint_kl@NAME`` and ``joint_kl@NAME`` + exact_suffix.
        names: of the samplers.
        exact_suffix: of the labels of samplers with the closed form.
        floor: joint KL of exact draws.
    """
    figure, axes = new_figure(size=(7.0, 0.9 + 0.32 * len(names)))
    ax = axes[0, 0]
    for i, (suffix, label) in enumerate(((exact_suffix, "exact distribution"), ("", "learned energy"))):
        for y, name in enumerate(names):
            values = np.maximum(metrics[f"joint_kl@{name}{suffix}"], 1e-7)
            ax.plot(
                values,
                [y + 0.16 * (1 - 2 * i)] * len(values),
                color=nth_colour(i),
                marker=nth_marker(i),
                markersize=5,
                linestyle="none",
                label=label if y == 0 else None,
            )
    ax.axvline(floor, color=GREY, linestyle=":", linewidth=1, label="exact draws")
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("KL of (a, s') to the tilted distribution, by moments (nats); every seed")
    ax.legend(frameon=False, fontsize=8)
    return figure


def draw_rank_histograms(traces: Mapping[str, Array], groups: int = 4, bins: int = 20) -> Figure:
    """Draw rank histograms (Vehtari et al. 2021) of groups of chains of each trace (T, W): flat if they mix.

    The band holds 95 % of the bars of chains that mix: of independent draws, the bars' standard error widened by the
    root of the draws over their effective number (ArviZ).
    """
    figure, axes = new_figure(1, len(traces), size=(3.0 * len(traces) + 0.4, 3.0), sharey=True)
    for ax, (name, trace) in zip(axes[0], traces.items(), strict=True):
        late = trace[len(trace) // 2 :].T
        ranks = array_stats.compute_ranks(late.ravel(), relative=True).reshape(late.shape)
        for i, part in enumerate(np.array_split(ranks, groups)):
            ax.hist(part.ravel(), bins=bins, range=(0, 1), histtype="step", color=nth_colour(i), linewidth=1.2)
        low, high = rank_band(late, groups, bins)
        ax.axhspan(low, high, color=GREY, alpha=0.25, linewidth=0)
        ax.axhline(late.size / groups / bins, color=GREY, linestyle="--", linewidth=1)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("rank among all chains")
    axes[0, 0].set_ylabel(f"draws, {groups} groups of chains; band: 95 % if they mix", fontsize=8)
    return figure


def rank_band(chains: Array, groups: int, bins: int) -> tuple[float, float]:
    """Return the 95 % interval of a bar of the rank histogram of one group of chains (W, n) that mix."""
    size = chains.size / groups
    ess = float(array_stats.ess(chains, chain_axis=0, draw_axis=1)) if chains.shape[1] >= 4 else float(chains.size)
    wider = max(1.0, chains.size / ess) if ess > 0 else float(chains.size)
    # a group is compared with all chains, of which it is a part
    variance = size * (1 / bins) * (1 - 1 / bins) * (1 - 1 / groups) * wider
    half = 1.96 * math.sqrt(variance)
    return max(0.0, size / bins - half), size / bins + half
