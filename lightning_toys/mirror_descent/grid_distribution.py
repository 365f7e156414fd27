"""The exact distribution of Metropolis-Hastings chains of one action, by transition matrices on a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import special

from lightning_toys.mirror_descent.joint import Array
from lightning_toys.mirror_descent.joint_distribution import Tilted
from lightning_toys.mirror_descent.kernels import mala_transition_matrix
from lightning_toys.mirror_descent.mixture import Mixture
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.truth import OneAction

POINTS_PER_STD = 16.0  # of the narrowest component and proposal
HALF_WIDTH = 8.0  # standard deviations of each component, at each level, that the grid covers
MAX_POINTS = 2001
LOST = 1e-6  # probability of leaving the grid beyond which unadjusted steps' distribution counts as unknown


class Steps(NamedTuple):
    """Langevin steps on a tilted action.

    Attributes:
        target: the tilt.
        eta: step size.
        number: how many.
        adjusted: whether they are accepted or rejected, as MALA's.
    """

    target: Tilted
    eta: float
    number: int
    adjusted: bool = True


def straddle(grid: Array, breakpoints: Sequence[float]) -> Array:
    """Return an even grid moved so that the first jump lies halfway between two points: its sums are of second order.

    >>> straddle(np.array([0.0, 1.0, 2.0]), [1.25]).tolist()
    [-0.25, 0.75, 1.75]
    """
    if not breakpoints:
        return grid
    h = grid[1] - grid[0]
    out: Array = grid + ((breakpoints[0] - grid[0]) % h - 0.5 * h)
    return out


def action_grid(levels: Sequence[Mixture], narrowest: float, breakpoints: Sequence[float]) -> Array | None:
    """Return an even grid that covers the actions of all levels; None where it would be too large.

    A jump of Q lies halfway between two points, see :func:`straddle`; of several that cannot
    be had.

    Args:
        levels: the mixtures.
        narrowest: the finest standard deviation to resolve.
        breakpoints: where Q jumps.
    """
    means = np.concatenate([q.actions.means[:, 0] for q in levels])
    stds = np.sqrt(np.concatenate([q.actions.covariances[:, 0, 0] for q in levels]))
    low, high = float((means - HALF_WIDTH * stds).min()), float((means + HALF_WIDTH * stds).max())
    points = max(401, math.ceil((high - low) / min(narrowest, float(stds.min())) * POINTS_PER_STD))
    if points > MAX_POINTS or len(breakpoints) > 1:
        return None
    return straddle(np.linspace(low, high, points), breakpoints)


def targets_on_grid(problem: Problem, tilted: Tilted, grid: Array) -> tuple[Array, Array]:
    """Return the target's log density (n,) and its gradient (n,) as chains see them."""
    log_p, gradient = problem.model.action_target(tilted)(torch.from_numpy(grid).unsqueeze(0))
    return log_p.numpy(), gradient[0].numpy()


def start_mass(level: Mixture, grid: Array) -> Array:
    """Return the probability of each point of an even grid (n,) under a level's action."""
    p = np.exp(level.actions.log_density(grid[:, None]))
    out: Array = p / p.sum()
    return out


def langevin_distribution(problem: Problem, start: Mixture, moves: Sequence[Steps]) -> OneAction | None:
    """Return the distribution of x after Langevin steps from a level's action, s' drawn at the end; None if unknown.

    Nor is it where unadjusted steps leave the grid with more than probability ``LOST``: on the grid they would stay.

    Args:
        problem: of a mixture.
        start: the level whose action chains start from.
        moves: the steps, in order.
    """
    if problem.joint.action_dim != 1:
        return None
    done = [m for m in moves if m.number > 0]
    narrowest = min((math.sqrt(2 * m.eta) for m in done), default=math.inf)
    levels = [start, problem.joint.clean, *(m.target.level for m in done)]
    grid = action_grid(levels, narrowest, problem.reward.breakpoints)
    if grid is None:
        return None
    p, lost = start_mass(start, grid), 0.0
    for move in done:
        log_p, gradient = targets_on_grid(problem, move.target, grid)
        always = None if move.adjusted else np.ones_like
        P = mala_transition_matrix(grid, log_p, gradient, move.eta, always)
        leaves = np.zeros_like(grid) if move.adjusted else probability_beyond(grid, gradient, move.eta)
        for _ in range(move.number):
            lost += float(p @ leaves)
            p = p @ P
    if lost > LOST:
        return None
    return OneAction(problem.joint.clean, problem.reward, grid, p / (grid[1] - grid[0]))


def probability_beyond(grid: Array, gradient: Array, eta: float) -> Array:
    """Return the probability (n,) that a Langevin proposal from each point of a grid (n,) lies beyond its ends.

    >>> probability_beyond(np.array([-1.0, 1.0]), np.array([0.0, 0.0]), 0.5).round(4).tolist()
    [0.5228, 0.5228]
    """
    mean, std = grid + eta * gradient, math.sqrt(2 * eta)
    out: Array = special.ndtr((grid[0] - mean) / std) + special.ndtr((mean - grid[-1]) / std)
    return out


def independence_distribution(problem: Problem, steps: int) -> OneAction | None:
    """Return the distribution of x after independence-MH steps from q; see :func:`langevin_distribution`."""
    clean: Mixture = problem.joint.clean
    grid = None
    if problem.joint.action_dim == 1:
        grid = action_grid([clean], math.inf, problem.reward.breakpoints)
    if grid is None:
        return None
    q = start_mass(clean, grid)
    log_w = problem.tilted.log_weight(torch.from_numpy(grid).unsqueeze(0)).numpy()
    P = q * np.exp(np.minimum(0.0, log_w[None, :] - log_w[:, None]))
    np.fill_diagonal(P, 0.0)
    P[np.diag_indices_from(P)] = 1.0 - P.sum(1)
    p = q
    for _ in range(steps):
        p = p @ P
    return OneAction(clean, problem.reward, grid, p / (grid[1] - grid[0]))
