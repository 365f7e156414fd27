"""Figures: densities of samples, error against cost, error against refreshes, rank histograms, learned scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from arviz_stats.base import array_stats  # type: ignore[attr-defined]
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats as scipy_stats
from scipy.optimize import isotonic_regression

from lightning_toys.mirror_descent.diagnostics import Array, Sample
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.plotting import COLOURS, GREY, MARKERS, new_figure
from lightning_toys.stats import mean_ci

FAMILIES = (
    ("plain", ("importance", "independence_mh", "ula", "mala", "gibbs")),
    ("annealed", ("pc_",)),
    ("reverse SDE", ("sde_",)),
    ("reverse ODE", ("ode_",)),
    ("twisted SMC", ("smc_",)),
)


def family_index(name: str) -> int:
    """Return the index in FAMILIES of a sampler's family."""
    return next(i for i, (_, prefixes) in enumerate(FAMILIES) if any(name.startswith(p) for p in prefixes))


def draw_density(
    ax: Axes, x: Array, mean: float, std: float, prior: tuple[float, float], label: str, bins: int
) -> None:
    """Draw a histogram of x (n,) with the densities N(mean, std^2) of the target and N(*prior) of the untilted one."""
    low = min(mean - 4.5 * std, prior[0] - 3.5 * prior[1])
    high = max(mean + 4.5 * std, prior[0] + 3.5 * prior[1])
    ax.hist(x, bins=bins, range=(low, high), density=True, color=COLOURS[0], alpha=0.35, label=label)
    line = np.linspace(low, high, 400)
    ax.plot(line, scipy_stats.norm.pdf(line, mean, std), color=COLOURS[1], label="tilted law, exact")
    ax.plot(line, scipy_stats.norm.pdf(line, *prior), color=GREY, linestyle="--", linewidth=1, label="untilted law")
    ax.set_ylabel("density")


def draw_densities(problem: Problem, name: str, sample: Sample, exact: Sample, bins: int) -> Figure:
    """Draw one sampler's actions and next states with the target's densities, beside those of exact draws."""
    target, clean = problem.tilted_joint, problem.joint.clean
    figure, axes = new_figure(2, 2, size=(9.4, 6.0), sharex="row")
    for row, (what, i) in enumerate((("action", 0), ("next state", 1))):
        prior = (float(clean.m[i]), math.sqrt(float(clean.C[i, i])))
        densities = (float(target.m[i]), math.sqrt(float(target.C[i, i])), prior)
        for ax, shown, label in ((axes[row, 0], sample, name), (axes[row, 1], exact, "exact draws")):
            draw_density(ax, shown.a if i == 0 else shown.s, *densities, label=label, bins=bins)
            ax.set_xlabel(what)
            ax.set_title(f"{what}: {label}", fontsize=9)
            ax.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{name}: {len(sample.a)} draws of one seed", fontsize=10)
    return figure


def draw_error_vs_cost(
    metrics: Mapping[str, list[float]], costs: Mapping[str, int], exact: Mapping[str, float]
) -> Figure:
    """Draw the KL to the target against evaluations per sample, all samplers in one figure.

    Args:
        metrics: has ``joint_kl@NAME`` and ``action_kl@NAME`` of each sampler, one value a seed.
        costs: evaluations per sample of each sampler.
        exact: ``joint_kl`` and ``action_kl`` of exact draws.
    """
    figure, axes = new_figure(1, 2, size=(12.5, 5.4), sharex=True)
    for ax, metric, title in (
        (axes[0, 0], "joint_kl", "KL of (a, s') to the tilted law, by moments (nats)"),
        (axes[0, 1], "action_kl", "KL of a alone (nats)"),
    ):
        points: list[tuple[float, float, str]] = []
        for name, cost in costs.items():
            kind = family_index(name)
            values = np.maximum(np.array(metrics[f"{metric}@{name}"]), 1e-12)
            e = mean_ci(values)
            half = 0.0 if math.isnan(e.half_width) else e.half_width
            low = min(half, e.mean * 0.9)
            ax.errorbar(
                cost, e.mean, yerr=[[low], [half]], color=COLOURS[kind], marker=MARKERS[kind], capsize=2, markersize=6
            )
            points.append((float(cost), e.mean, name))
        ax.axhline(exact[metric], color=GREY, linestyle=":", linewidth=1)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("evaluations of score, Q and refresh to a sample")
        ax.set_title(title, fontsize=9)
        ax.set_xlim(min(costs.values()) / 2, max(costs.values()) * 12)
        label_points(ax, points)
    for kind, (label, _) in enumerate(FAMILIES):
        axes[0, 0].plot([], [], color=COLOURS[kind], marker=MARKERS[kind], linestyle="none", label=label)
    axes[0, 0].plot([], [], color=GREY, linestyle=":", label="what exact draws would show")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle("error of the law against cost: mean and 95 % interval over seeds", fontsize=10)
    return figure


def animate(path: Path, problem: Problem, name: str, trace: Array, bins: int, dpi: int = 80) -> None:
    """Write a GIF of an annealed sampler's actions: a frame a step, with the tilted density of its level.

    Args:
        path: the file.
        problem: the sampling problem.
        name: the sampler's name.
        trace: actions (T, n) after each step.
        bins: bars of the histograms.
        dpi: resolution.
    """
    target, clean = problem.tilted_joint, problem.joint.clean
    low = float(min(clean.m[0] - 3.5 * math.sqrt(clean.C[0, 0]), trace.min()))
    high = float(max(target.m[0] + 4.5 * math.sqrt(target.C[0, 0]), trace.max()))
    line = np.linspace(low, high, 300)
    s = problem.settings
    steps = s.action_steps_per_level * max(1, s.refresh_L)
    tilted_at_step = [tilted for tilted in problem.levels for _ in range(steps)]
    tilted_at_step += [problem.target] * problem.schedule.final_steps
    figure, axes = new_figure(size=(5.6, 3.6))
    ax = axes[0, 0]
    writer = PillowWriter(fps=10)
    with writer.saving(figure, str(path), dpi):
        for t, (a, at) in enumerate(zip(trace, tilted_at_step, strict=True)):
            ax.clear()
            ax.hist(a, bins=bins, range=(low, high), density=True, color=COLOURS[0], alpha=0.35, label=name)
            level_density = scipy_stats.norm.pdf(line, at.mu, 1 / math.sqrt(at.tau))
            ax.plot(line, level_density, color=COLOURS[2], linewidth=1.2, label="tilted law of this level")
            clean_density = scipy_stats.norm.pdf(line, target.m[0], math.sqrt(target.C[0, 0]))
            ax.plot(line, clean_density, color=COLOURS[1], label="tilted law, clean")
            ax.set_ylim(0, 1.35 * clean_density.max())
            ax.set_xlabel("action")
            ax.set_ylabel("density")
            ax.set_title(
                f"{name}: step {t + 1} of {len(trace)}, abar {at.level.abar:.2f}, beta {at.beta:.2f}", fontsize=9
            )
            ax.legend(frameon=False, fontsize=7, loc="upper left")
            writer.grab_frame()


def label_points(ax: Axes, points: Sequence[tuple[float, float, str]], gap: float = 0.046) -> None:
    """Write the names of points (x, y) on logarithmic axes in a column at the right, in the order of their heights."""
    low, high = np.log10(ax.get_ylim())
    ordered = sorted(points, key=lambda p: p[1])
    wanted = np.array([(math.log10(y) - low) / (high - low) for _, y, _ in ordered])
    steps = gap * np.arange(len(wanted))
    # the nearest heights that are a gap apart: an isotonic fit, once the gaps are taken off
    heights = isotonic_regression(wanted - steps).x + steps
    heights -= max(0.0, heights[-1] - 0.98)
    heights += max(0.0, 0.02 - heights[0])
    for (x, y, name), up in zip(ordered, heights, strict=True):
        colour = COLOURS[family_index(name)]
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


def draw_kl_vs_refresh(curves: Mapping[str, Mapping[str, Array]], steps: Sequence[int], floor: float) -> Figure:
    """Draw KL of action and next state against refresh_L.

    Args:
        curves: sampler to metric to values (R, L + 1).
        steps: refresh_L of each column.
        floor: expected KL of exact draws.
    """
    figure, axes = new_figure(1, 2, size=(9.4, 3.8), sharex=True)
    for ax, metric, title in ((axes[0, 0], "action_kl", "action"), (axes[0, 1], "state_kl", "next state")):
        for i, (name, found) in enumerate(curves.items()):
            rows = np.maximum(found[metric], 1e-9)
            estimates = [mean_ci(column) for column in rows.T]
            half = np.array([0.0 if math.isnan(e.half_width) else e.half_width for e in estimates])
            mean = np.array([e.mean for e in estimates])
            low = np.minimum(half, 0.9 * mean)
            ax.errorbar(steps, mean, yerr=[low, half], color=COLOURS[i], marker=MARKERS[i], capsize=3, label=name)
        ax.axhline(floor, color=GREY, linestyle=":", linewidth=1, label="exact draws, on average")
        ax.set_yscale("log")
        ax.set_xticks(steps)
        ax.set_xlabel("refresh_L: rounds at each level (0: one, without refresh)")
        ax.set_ylabel("KL to the tilted law (nats)")
        ax.set_title(title, fontsize=9)
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


def draw_learned_vs_exact(metrics: Mapping[str, list[float]], names: Sequence[str], exact_suffix: str) -> Figure:
    """Draw each sampler's joint KL with the learned energy beside that with the closed form, every seed a point.

    Args:
        metrics: has ``joint_kl@NAME`` and ``joint_kl@NAME`` + exact_suffix.
        names: of the samplers.
        exact_suffix: of the labels of samplers with the closed form.
    """
    figure, axes = new_figure(size=(7.0, 0.9 + 0.32 * len(names)))
    ax = axes[0, 0]
    for i, (suffix, label) in enumerate(((exact_suffix, "exact law"), ("", "learned energy"))):
        for y, name in enumerate(names):
            values = np.maximum(metrics[f"joint_kl@{name}{suffix}"], 1e-7)
            ax.plot(
                values,
                [y + 0.16 * (1 - 2 * i)] * len(values),
                color=COLOURS[i],
                marker=MARKERS[i],
                markersize=5,
                linestyle="none",
                label=label if y == 0 else None,
            )
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("KL of (a, s') to the tilted law, by moments (nats); every seed")
    ax.legend(frameon=False, fontsize=8)
    return figure


def draw_rank_histograms(traces: Mapping[str, Array], groups: int = 4, bins: int = 20) -> Figure:
    """Draw rank histograms (Vehtari et al. 2021) of groups of chains of each trace (T, W): flat if they mix."""
    figure, axes = new_figure(1, len(traces), size=(3.0 * len(traces) + 0.4, 3.0), sharey=True)
    for ax, (name, trace) in zip(axes[0], traces.items(), strict=True):
        late = trace[len(trace) // 2 :].T
        ranks = array_stats.compute_ranks(late.ravel(), relative=True).reshape(late.shape)
        for i, part in enumerate(np.array_split(ranks, groups)):
            ax.hist(part.ravel(), bins=bins, range=(0, 1), histtype="step", color=COLOURS[i], linewidth=1.2)
        ax.axhline(late.size / groups / bins, color=GREY, linestyle="--", linewidth=1)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("rank among all chains")
    axes[0, 0].set_ylabel(f"draws, {groups} groups of chains")
    return figure
