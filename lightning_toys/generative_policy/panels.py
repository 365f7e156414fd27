"""Panels of figures: samples over the target's contours, by pairs of coordinates, and one mode enlarged."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Circle
from numpy.typing import NDArray
from torch import Tensor

from lightning_toys.generative_policy.mixture import Mixture
from lightning_toys.generative_policy.target import Target
from lightning_toys.plotting import COLOURS
from lightning_toys.stats import share_interval

Array = NDArray[np.float64]
BLUE, RED = COLOURS[0], "#B40426"
MAX_PAIRS = 3  # of coordinates that a figure shows


def axis_pairs(dim: int) -> list[tuple[int, ...]]:
    """Return the pairs of coordinates that figures show, the first :data:`MAX_PAIRS`; a lone one on a line.

    >>> axis_pairs(1), axis_pairs(2), axis_pairs(6)
    ([(0,)], [(0, 1)], [(0, 1), (0, 2), (0, 3)])
    """
    pairs: list[tuple[int, ...]] = list(itertools.combinations(range(dim), 2)) or [(0,)]
    return pairs[:MAX_PAIRS]


def pairs_left_out(dim: int) -> str:
    """Return a remark on the pairs of coordinates that figures leave out, or nothing.

    >>> pairs_left_out(2), pairs_left_out(6)
    ('', ', 3 of 15 pairs of coordinates')
    """
    pairs = dim * (dim - 1) // 2
    return f", {MAX_PAIRS} of {pairs} pairs of coordinates" if pairs > MAX_PAIRS else ""


def say(ax: Axes, words: str) -> None:
    """Write why a panel is empty."""
    ax.text(0.5, 0.5, words, ha="center", va="center", transform=ax.transAxes, fontsize=9, color="0.35", wrap=True)
    ax.set_xticks([])
    ax.set_yticks([])


def draw_contours(ax: Axes, target: Target, half: float = 1.0, centre: Sequence[float] = (0.0, 0.0)) -> None:
    """Draw the density of a target on the plane in red over a square of half-width ``half`` around ``centre``.

    Its contours, or where it is flat its support.
    """
    n = 400 if not isinstance(target, Mixture) or len(target.means) <= 16 else 120
    x = np.linspace(centre[0] - half, centre[0] + half, n)
    y = np.linspace(centre[1] - half, centre[1] + half, n)
    grid = torch.from_numpy(np.stack(np.meshgrid(x, y), -1))
    density = target.log_prob(grid)
    top = float(density.max())
    inside = density[density.isfinite()]
    if bool((inside < top - 0.5).any()):
        # the levels 1, 2 and 3 standard deviations from a lone peak
        levels, height = [-4.5, -2.0, -0.5], torch.where(density.isfinite(), density - top, -1e3)
        ax.contour(x, y, height, levels=levels, colors=RED, linewidths=0.8, linestyles="solid")
    else:  # flat where it is not nothing
        ax.contourf(x, y, density.isfinite(), levels=[0.5, 1.5], cmap=ListedColormap([RED]), alpha=0.25)
    ax.set_xlim(centre[0] - half, centre[0] + half)
    ax.set_ylim(centre[1] - half, centre[1] + half)
    ax.set_aspect("equal")


def red_words(target: Target, bounds: str = "red: 1, 2, 3 sd") -> str:
    """Return what figures show of a target in red.

    >>> red_words(Target())
    'reference samples (red)'
    """
    return f"target ({bounds})" if target.marginal(axis_pairs(target.dim)[0]) is not None else "reference samples (red)"


def draw_scatter(
    ax: Axes,
    target: Target,
    x: Array,
    title: str,
    axes: tuple[int, ...] | None = None,
    reference: Tensor | None = None,
) -> None:
    """Draw two coordinates of samples x (n, D) in blue over the target's contours; a histogram of a lone one.

    Where the two coordinates' density is not known, over other samples in red.

    Args:
        ax: the panel.
        target: the distribution of x.
        x: the samples.
        title: the panel's.
        axes: which coordinates; the first two if left out.
        reference: samples of the target (m, D).
    """
    axes = axis_pairs(x.shape[1])[0] if axes is None else axes
    marginal = target.marginal(axes)
    low, high = (b.numpy()[list(axes)] for b in target.box())
    centre, half = (low + high) / 2, 1.05 * (high - low) / 2
    ends = [(float(c - h), float(c + h)) for c, h in zip(centre, half, strict=True)]
    behind = None if marginal is not None or reference is None else reference.numpy()[:, list(axes)]
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(f"action {axes[0] + 1}")
    if len(axes) == 1:
        ax.hist(x[:, axes[0]], bins=200, range=ends[0], density=True, histtype="stepfilled", color=BLUE, alpha=0.5)
        if marginal is not None:
            line = torch.linspace(*ends[0], 2000, dtype=torch.float64)
            height = marginal.log_prob(line[:, None]).exp()
            if not marginal.normalised:
                height = height / torch.trapezoid(height, line)
            ax.plot(line, height, color=RED, linewidth=0.8)
        elif behind is not None:
            bins = min(200, max(10, len(behind) // 20))
            ax.hist(behind[:, 0], bins=bins, range=ends[0], density=True, histtype="step", color=RED, linewidth=0.8)
        ax.set_ylabel("density")
        return
    if behind is not None:
        ax.plot(behind[:, 0], behind[:, 1], ".", color=RED, markersize=3.2, alpha=0.4, rasterized=True)
    ax.plot(x[:, axes[0]], x[:, axes[1]], ".", color=BLUE, markersize=1.6, alpha=0.5, rasterized=True)
    ax.set_ylabel(f"action {axes[1] + 1}")
    if marginal is not None:
        draw_contours(ax, marginal, float(half.max()), [float(c) for c in centre])
    ax.set_xlim(*ends[0])
    ax.set_ylim(*ends[1])
    ax.set_aspect("equal")


def fullest_mode(target: Target, x: Tensor) -> tuple[Tensor, float] | None:
    """Return centre (D,) and standard deviation of the mode that most of the samples x (n, D) are nearest to.

    Of a mixture whose modes have several components that of the first one; None where there is no Gaussian.
    """
    if not target.has_modes:
        return None
    mode = int(torch.bincount(target.nearest(x)[0]).argmax())
    if isinstance(target, Mixture):
        first = int((target.modes == mode).nonzero()[0])
        return target.means[first], float(target.stds[first])
    shapes = target.mode_shapes()
    return None if shapes is None else (shapes[0][mode], float(shapes[1][mode]))


def draw_mode_zoom(ax: Axes, target: Target, x: Array, title: str) -> None:
    """Draw the samples x (n, 2) around the fullest mode, with circles at 1, 2 and 3 standard deviations."""
    found = fullest_mode(target, torch.from_numpy(x))
    if found is None:
        say(ax, f"{type(target).__name__}: modes\nwithout {'a standard deviation' if target.has_modes else 'names'}")
        return
    centre, std = found[0].numpy(), found[1]
    half = 4.5 * std
    near = x[np.abs(x - centre).max(1) < half]
    ax.plot(near[:, 0], near[:, 1], ".", color=BLUE, markersize=2.2, alpha=0.6, rasterized=True)
    if len(near) == 0:
        ax.text(0.5, 0.5, "no sample here", ha="center", va="center", transform=ax.transAxes, fontsize=9)
    for k in (1, 2, 3):
        ax.add_patch(Circle((float(centre[0]), float(centre[1])), k * std, fill=False, edgecolor=RED, linewidth=0.9))
    ax.set_xlim(centre[0] - half, centre[0] + half)
    ax.set_ylim(centre[1] - half, centre[1] + half)
    ax.set_aspect("equal")
    ax.locator_params(nbins=4)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("action 1")
    ax.set_ylabel("action 2")


def share_band(ax: Axes, x: Array, rows: Array, count: float, colour: str, label: str) -> None:
    """Draw the mean of shares (R, T) over replicas as a line, and :func:`share_interval` as a band."""
    many = len(x) > 1
    ax.plot(x, rows.mean(0), "-" if many else "o", color=colour, label=label, linewidth=1.6)
    if len(rows) > 1:
        low, high = share_interval(rows, count)
        if many:
            ax.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
        else:
            ax.vlines(x, low, high, color=colour)
