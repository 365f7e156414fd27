"""Exact densities of a scalar action under Metropolis-Hastings kernels, by transition matrices on a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_toys.mirror_descent.joint import Array, Gaussian
from lightning_toys.mirror_descent.kernels import mala_transition_matrix
from lightning_toys.mirror_descent.tilt import TiltedAction

MAX_POINTS = 3001  # of a grid: a transition matrix then takes 70 MB, and half a second
MAX_WORK = 3e9  # entries of all transition matrices of one density: a minute or so


@dataclass(frozen=True)
class Moves:
    """Some steps of one Markov kernel on the action.

    Attributes:
        mean: of its target, or near it.
        std: of its target; the grid reaches seven of them to either side.
        narrowest: the finest standard deviation that the grid has to resolve.
        steps: how often it is applied.
        matrix: transition probabilities (n, n) between the points of a grid (n,).
    """

    mean: float
    std: float
    narrowest: float
    steps: int
    matrix: Callable[[Array], Array]


def mala_moves(
    target: TiltedAction, eta: float, steps: int, acceptance: Callable[[Array], Array] | None = None
) -> Moves:
    """Return MALA steps of size eta; see :func:`mala_transition_matrix` for ``acceptance``."""
    mu, tau = target.mu, target.tau

    def matrix(grid: Array) -> Array:
        gradient = (mu - grid) * tau
        return mala_transition_matrix(grid, 0.5 * (grid - mu) * gradient, gradient, eta, acceptance)

    std = 1 / math.sqrt(tau)
    return Moves(mu, std, min(std, 2 * math.sqrt(2 * eta)), steps, matrix)


def independence_moves(prior: Gaussian, target: TiltedAction, steps: int) -> Moves:
    """Return independence Metropolis-Hastings steps with proposals from the prior's action."""
    m, var = float(prior.m[0]), float(prior.C[0, 0])

    def matrix(grid: Array) -> Array:
        x = grid - m
        q = np.exp(-0.5 * np.square(x) / var)
        log_w = -0.5 * target.tau * np.square(grid - target.mu) + 0.5 * np.square(x) / var
        P: Array = q / q.sum() * np.exp(np.minimum(0.0, log_w[None, :] - log_w[:, None]))
        np.fill_diagonal(P, 0.0)
        P[np.diag_indices_from(P)] = 1.0 - P.sum(1)
        return P

    std = 1 / math.sqrt(target.tau)
    return Moves(target.mu, std, min(std, math.sqrt(var)), steps, matrix)


class ActionDensity:
    """The density of an action that starts as the prior's and goes through Markov kernels, accurate to the quadrature.

    What it takes is known before anything is computed: :attr:`known`.

    Args:
        prior: the distribution at the start.
        moves: the kernels, one after the other.
        points_per_std: points to a standard deviation of the narrowest target; with 20 the default problem's mean and
            variance are right to 3e-8.
        half_width: standard deviations of every target that the grid covers.
    """

    def __init__(
        self, prior: Gaussian, moves: Sequence[Moves], points_per_std: float = 20.0, half_width: float = 7.0
    ) -> None:
        self.prior, self.moves = prior, [m for m in moves if m.steps > 0]
        first = (float(prior.m[0]), math.sqrt(float(prior.C[0, 0])))
        covered = [first, *((m.mean, m.std) for m in self.moves)]
        self.low = min(mean - half_width * std for mean, std in covered)
        self.high = max(mean + half_width * std for mean, std in covered)
        finest = min(first[1], *(m.narrowest for m in self.moves)) if self.moves else first[1]
        needed = (self.high - self.low) / finest * points_per_std
        # of a narrow target fewer points to a standard deviation do as well, within reason
        self.points = 1 + round(min(max(400.0, needed), max(MAX_POINTS - 1.0, needed / 2)))

    @property
    def work(self) -> float:
        """Entries of all transition matrices, those that only differ in their number of steps once."""
        return len(self.moves) * float(self.points) ** 2

    @property
    def known(self) -> bool:
        """Whether the density can be computed within ``MAX_POINTS`` and ``MAX_WORK``."""
        return self.points <= MAX_POINTS and self.work <= MAX_WORK

    @property
    def why_unknown(self) -> str:
        """Why the density is not computed; empty if it is."""
        if self.known:
            return ""
        over = f"{self.points:.3g} points" if self.points > MAX_POINTS else f"{len(self.moves)} matrices"
        return f"its exact density would take a grid of {over} (at most {MAX_POINTS} points, {MAX_WORK:.0g} entries)"

    @cached_property
    def solution(self) -> tuple[Array, Array]:
        """The grid (n,) and the density on it (n,)."""
        grid: Array = np.linspace(self.low, self.high, self.points)
        p = np.exp(-0.5 * np.square(grid - self.prior.m[0]) / self.prior.C[0, 0])
        p /= p.sum()
        for move in self.moves:
            P = move.matrix(grid)
            for _ in range(move.steps):
                p = p @ P
        return grid, p / (p.sum() * (grid[1] - grid[0]))

    def solve(self) -> tuple[Array, Array]:
        """Return the grid (n,) and the density on it (n,).

        Raises:
            ValueError: it is not :attr:`known`.
        """
        if not self.known:
            raise ValueError(self.why_unknown)
        return self.solution


def joint_acceptance(eta: float, points: int = 301, half_width: float = 7.0) -> Callable[[Array], Array]:
    """Return g(l) = E min(1, exp(l + D)) for D the log ratio of a MALA step of a standard normal u: l is the action's.

    With u' = (1 - eta) u + sqrt(2 eta) xi, D = -(eta / 4) (u'^2 - u^2). By the trapezoidal rule over (u, xi), whose
    sorted cumulative sums give g at any l at once.
    """
    z = np.linspace(-half_width, half_width, points)
    w = np.exp(-0.5 * z**2)
    w /= w.sum()
    moved = (1 - eta) * z[:, None] + math.sqrt(2 * eta) * z[None, :]
    D = (-0.25 * eta * (np.square(moved) - np.square(z)[:, None])).ravel()
    weight = (w[:, None] * w[None, :]).ravel()
    order = np.argsort(D)
    D, weight = D[order], weight[order]
    # those below -l contribute exp(l + D), the others 1
    scaled = np.concatenate([[0.0], np.cumsum(weight * np.exp(D))])
    rest = np.concatenate([[1.0], 1.0 - np.cumsum(weight)])

    def g(log_ratio: Array) -> Array:
        below = np.searchsorted(D, -log_ratio.ravel())
        exponential = np.exp(np.minimum(log_ratio.ravel(), 700.0))
        out: Array = (exponential * scaled[below] + np.maximum(rest[below], 0.0)).reshape(log_ratio.shape)
        return np.minimum(out, 1.0)

    table = np.linspace(-60.0, 60.0, 12001)
    values = g(table)

    def interpolated(log_ratio: Array) -> Array:
        out: Array = np.interp(log_ratio, table, values)
        return out

    return interpolated
