"""Best-of-N sampling: its draws, its exact distribution, and its KL from the untilted one."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch

from lightning_toys.errors import REPEATS, bounded
from lightning_toys.mirror_descent.joint import Array
from lightning_toys.mirror_descent.joint_distribution import without_rows
from lightning_toys.mirror_descent.kernels import Noise
from lightning_toys.mirror_descent.problem import Cost, Problem
from lightning_toys.mirror_descent.sampler import Draws, Sampler, refreshed_moments
from lightning_toys.mirror_descent.truth import OneAction

HALF_WIDTH = 9.0  # standard deviations of each component that the exact distribution's points cover
POINTS = 12_001  # for all components together, but not less for one than
LEAST_POINTS = 1001


class BestOfN(Sampler):
    """N independent draws of q, of which the one with the largest Q is kept (Stiennon et al. 2020, arXiv 2009.01325).

    Its density is q(a) N F(Q(a))^(N - 1), F the distribution function of Q under q, whatever lambda is: it does not
    head for the tilt. With one action its distribution is known here.

    Args:
        problem: the sampling problem.
        n: N.

    Raises:
        ToyError: N is out of bounds.
    """

    family = "plain"
    num_traced = 0
    reads_score = False

    def __init__(self, problem: Problem, n: int = 8) -> None:
        super().__init__(problem)
        bounded("--model.samplers: BestOfN's n", n, 1, REPEATS)
        self.n, self.name = n, f"best_of_{n}"

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        model, clean = self.problem.model, self.problem.joint.clean
        Q = clean.value_of(self.problem.reward)
        a = model.draw_action(noise, clean)
        best = Q.value(a)
        for _ in range(self.n - 1):
            other = model.draw_action(noise, clean)
            value = Q.value(other)
            a, best = torch.where(value > best, other, a), torch.maximum(value, best)
        return Draws(without_rows(a), without_rows(model.draw_state(noise, clean, a)))

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        return Cost(prior=self.n, value=self.n, refresh=1)

    @cached_property
    def action_density(self) -> tuple[Array, Array]:
        """Increasing points (n,), even of one Gaussian, and the density of the action there (n,), of one action.

        Each component has points of its own, however far apart and narrow they are; each jump of Q has one on either
        side.
        """
        clean, reward = self.problem.joint.clean, self.problem.reward
        if self.problem.model.linear:
            m, std = np.array([clean.m[0]]), np.array([math.sqrt(clean.C[0, 0])])
            weights = np.ones(1)
        else:
            m, std, weights = clean.means[:, 0], np.sqrt(clean.covariances[:, 0, 0]), clean.weights
        points = max(LEAST_POINTS, POINTS // len(m))
        pieces = [np.linspace(a - HALF_WIDTH * s, a + HALF_WIDTH * s, points) for a, s in zip(m, std, strict=True)]
        low, high = min(x[0] for x in pieces), max(x[-1] for x in pieces)
        near = 1e-9 * float(std.min())
        pieces += [np.array([p - near, p + near]) for p in reward.breakpoints if low < p - near and p + near < high]
        grid = np.unique(np.concatenate(pieces))
        q = weights @ (np.exp(-0.5 * np.square((grid - m[:, None]) / std[:, None])) / std[:, None])
        cells = cell_widths(grid)
        share = q * cells
        Q = clean.value_of(reward).value(torch.from_numpy(grid).unsqueeze(0)).numpy()
        return grid, best_of_n_mass(share / share.sum(), Q, self.n) / cells

    def exact_moments(self) -> dict[str, float]:
        """See :meth:`Sampler.exact_moments`."""
        return refreshed_moments(self.problem, *self.action_density)

    def exact_distribution_on_mixtures(self) -> OneAction | None:
        """See :meth:`Sampler.exact_distribution_on_mixtures`: known with one action."""
        if self.problem.joint.action_dim != 1:
            return None
        return OneAction(self.problem.joint.clean, self.problem.reward, *self.action_density)


def cell_widths(grid: Array) -> Array:
    """Return the weights (n,) of the trapezoidal rule at increasing points (n,).

    >>> cell_widths(np.array([0.0, 1.0, 3.0])).tolist()
    [0.5, 1.5, 1.0]
    """
    half = 0.5 * np.diff(grid)
    out: Array = np.concatenate([half, [0.0]]) + np.concatenate([[0.0], half])
    return out


def best_of_n_mass(q: Array, Q: Array, n: int) -> Array:
    """Return the probability (k,) of each of k outcomes under best-of-n (Beirami et al. 2024, arXiv 2401.01879).

    The best lies among outcomes with value Q with probability F(Q)^n - F(Q-)^n, and among those as under q.

    >>> best_of_n_mass(np.array([0.5, 0.25, 0.25]), np.array([0.0, 1.0, 1.0]), 2).tolist()
    [0.25, 0.375, 0.375]

    Args:
        q: probability of each outcome (k,), of sum 1.
        Q: value of each (k,).
        n: how many draws there are.
    """
    values, place = np.unique(Q, return_inverse=True)
    share = np.bincount(place, weights=q, minlength=len(values))
    F = np.concatenate([[0.0], np.minimum(np.cumsum(share), 1.0)])
    F[-1] = 1.0
    won = F[1:] ** n - F[:-1] ** n
    out: Array = q * np.divide(won, share, out=np.zeros_like(won), where=share > 0)[place]
    return out


def best_of_n_kl(n: int) -> float:
    """Return log n - (n - 1) / n, the KL (nats) from q of best-of-n where Q has no ties; else an upper bound."""
    return math.log(n) - (n - 1) / n
