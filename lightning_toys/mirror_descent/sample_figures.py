"""Figures of one sampler's draws: densities, distribution functions, residuals of s' | a, and animations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats as scipy_stats

from lightning_toys.mirror_descent.diagnostics import Array, Sample, redrawn_states, residual
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.sampler import Sampler
from lightning_toys.plotting import COLOURS, GREY, new_figure
from lightning_toys.training.noise import keyed_generator

KOLMOGOROV = 1.358  # sqrt(n) times the largest distance of 95 % of empirical distribution functions
FRAMES = 24  # of an animation, at most


def draw_density(
    ax: Axes, x: Array, mean: float, std: float, prior: tuple[float, float], label: str, bins: int
) -> tuple[float, float]:
    """Draw a histogram of x (n,) with the densities of target and untilted distribution; return the histogram's range.

    Args:
        ax: where.
        x: draws.
        mean: of the target.
        std: of the target.
        prior: mean and standard deviation of the untilted distribution.
        label: of the histogram.
        bins: of the histogram.
    """
    low = min(mean - 4.5 * std, prior[0] - 3.5 * prior[1])
    high = max(mean + 4.5 * std, prior[0] + 3.5 * prior[1])
    ax.hist(x, bins=bins, range=(low, high), density=True, color=COLOURS[0], alpha=0.35, label=label)
    line = np.linspace(low, high, 400)
    ax.plot(line, scipy_stats.norm.pdf(line, mean, std), color=COLOURS[1], label="tilted distribution, exact")
    ax.plot(
        line, scipy_stats.norm.pdf(line, *prior), color=GREY, linestyle="--", linewidth=1, label="untilted distribution"
    )
    ax.set_ylabel("density")
    return low, high


def draw_cdf_error(ax: Axes, x: Array, mean: float, std: float, colour: str, label: str, points: int = 400) -> None:
    """Draw the distribution function of x (n,) less that of N(mean, std^2), against the latter's quantile."""
    z = np.linspace(-3.5, 3.5, points)
    found = np.searchsorted(np.sort(x), mean + std * z, side="right") / len(x)
    ax.plot(z, found - scipy_stats.norm.cdf(z), color=colour, linewidth=1.2, label=label)


def draw_sample(problem: Problem, name: str, sample: Sample, exact: Sample, bins: int) -> Figure:
    """Draw one sampler's draws against the target: a row for the action, the next state, and the residual of s' | a.

    Left: densities. Right: what is left of the difference, with the band that 95 % of exact draws stay within. Next
    states are shown a second time, redrawn exactly from the sampler's own actions: what is wrong there comes from the
    action, what is wrong in s' alone from s' | a.

    Args:
        problem: gives the target.
        name: the sampler's name.
        sample: its draws, of one seed.
        exact: as many exact draws.
        bins: of the histograms.
    """
    target, clean, n = problem.tilted_joint, problem.linear_joint.clean, len(sample.a)
    figure, axes = new_figure(3, 2, size=(9.4, 8.4))
    band = KOLMOGOROV / math.sqrt(n)
    redrawn = redrawn_states(problem, sample)
    for row, (what, i) in enumerate((("action", 0), ("next state", 1))):
        prior = (float(clean.m[i]), math.sqrt(float(clean.C[i, i])))
        mean, std = float(target.m[i]), math.sqrt(float(target.C[i, i]))
        x, truth = (sample.a, exact.a) if i == 0 else (sample.s, exact.s)
        left, right = axes[row]
        span = draw_density(left, x, mean, std, prior, name, bins)
        right.axhspan(-band, band, color=GREY, alpha=0.2, linewidth=0, label="95 % of independent exact draws")
        draw_cdf_error(right, truth, mean, std, GREY, "exact draws")
        draw_cdf_error(right, x, mean, std, COLOURS[0], name)
        if i == 1:
            outline = {"bins": bins, "range": span, "density": True, "histtype": "step", "linewidth": 1.0}
            left.hist(redrawn, color=COLOURS[2], label="s' redrawn from its actions", **outline)
            draw_cdf_error(right, redrawn, mean, std, COLOURS[2], "s' redrawn from its actions")
        left.set_xlabel(what)
        right.set_xlabel(f"{what}, standard deviations from the target's mean")
        right.set_ylabel("distribution function less exact", fontsize=8)
    draw_residuals(axes[2, 0], axes[2, 1], problem, sample, bins)
    for ax in axes.ravel():
        ax.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{name}: {n} draws of one seed", fontsize=10)
    return figure


def draw_residuals(left: Axes, right: Axes, problem: Problem, sample: Sample, bins: int, slices: int = 12) -> None:
    """Draw the residuals of s' given a: their density, and their mean and standard deviation by a's quantile."""
    r = residual(problem, sample)
    left.hist(r, bins=bins, range=(-4.5, 4.5), density=True, color=COLOURS[0], alpha=0.35, label="residuals")
    line = np.linspace(-4.5, 4.5, 300)
    left.plot(line, scipy_stats.norm.pdf(line), color=COLOURS[1], label="standard normal")
    left.set_xlabel("residual of s' given a")
    left.set_ylabel("density")
    parts = [p for p in np.array_split(r[np.argsort(sample.a)], slices) if len(p) > 1]
    where = (np.arange(len(parts)) + 0.5) / len(parts)
    half = 1.96 / math.sqrt(len(r) / len(parts))
    right.axhspan(-half, half, color=GREY, alpha=0.2, linewidth=0, label="95 % of exact draws")
    right.plot(where, [p.mean() for p in parts], color=COLOURS[0], marker="o", markersize=3, label="mean")
    deviations = [p.std(ddof=1) - 1 for p in parts]
    right.plot(where, deviations, color=COLOURS[1], marker="s", markersize=3, label="standard deviation - 1")
    right.set_xlabel("quantile of a")
    right.set_ylabel("residual of s' given a", fontsize=8)


def animate(path: Path, problem: Problem, sampler: Sampler, sample: Sample, bins: int, dpi: int = 80) -> None:
    """Write a GIF of a sampler's actions and next states, a frame a step (or fewer), with the tilted densities.

    Of a sampler that records no next states they are drawn from s' | a at each step's level, as a refresh would.

    Args:
        path: the file.
        problem: the sampling problem.
        sampler: the sampler, in the problem's coordinates.
        sample: has ``trace`` (T, n), and ``states`` or not.
        bins: bars of the histograms.
        dpi: resolution.
    """
    trace = sample.trace
    assert trace is not None
    s, target, clean = problem.settings, problem.tilted_joint, problem.linear_joint.clean
    at_step = [problem.target] * len(trace)
    if sampler.annealed:
        tilted = [at for at in problem.levels for _ in range(s.action_steps_per_level)]
        at_step = (tilted + at_step)[: len(trace)]
    frames = np.unique(np.linspace(0, len(trace) - 1, min(FRAMES, len(trace))).round().astype(int))
    z = keyed_generator(0, 0, "animation").standard_normal(trace.shape[1])
    figure, axes = new_figure(1, 2, size=(9.4, 3.6))
    writer = PillowWriter(fps=10)
    with writer.saving(figure, str(path), dpi):
        for t in frames:
            at, a = at_step[t], trace[t]
            level = at.level
            states = level.rho * a + level.c + math.sqrt(level.v) * z if sample.states is None else sample.states[t]
            for i, (ax, x, what) in enumerate(zip(axes[0], (a, states), ("action", "next state"), strict=True)):
                mean, std = float(target.m[i]), math.sqrt(float(target.C[i, i]))
                low = min(mean - 4.5 * std, float(clean.m[i]) - 3.5 * math.sqrt(clean.C[i, i]))
                high = max(mean + 4.5 * std, float(clean.m[i]) + 3.5 * math.sqrt(clean.C[i, i]))
                line = np.linspace(low, high, 300)
                ax.clear()
                ax.hist(x, bins=bins, range=(low, high), density=True, color=COLOURS[0], alpha=0.35, label=sampler.name)
                if sampler.annealed:
                    middle, variance = at.mu, 1 / at.tau
                    if i == 1:
                        middle, variance = level.rho * middle + level.c, level.rho**2 * variance + level.v
                    density = scipy_stats.norm.pdf(line, middle, math.sqrt(variance))
                    ax.plot(line, density, color=COLOURS[2], linewidth=1.2, label="tilted distribution of this level")
                clean_density = scipy_stats.norm.pdf(line, mean, std)
                ax.plot(line, clean_density, color=COLOURS[1], label="tilted distribution, clean")
                ax.set_ylim(0, 1.35 * clean_density.max())
                ax.set_xlabel(what)
                ax.legend(frameon=False, fontsize=7, loc="upper left")
            axes[0, 0].set_ylabel("density")
            where = f", abar {level.abar:.2f}, beta {at.beta:.2f}" if sampler.annealed else ""
            figure.suptitle(f"{sampler.name}: step {t + 1} of {len(trace)}{where}", fontsize=9)
            writer.grab_frame()
