"""Samples of a target that is known by its density alone: weighted particles within its bounds.

The density needs no normalisation; its integral over the bounds is estimated beside.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_toys.errors import REPEATS, ToyError, bounded, require
from lightning_toys.generative_policy.target import Target
from lightning_toys.training.noise import keyed_generator

Array = NDArray[np.float64]
CHUNK = 2**14  # points at which a density is asked for at once
ACCEPTED = 0.574  # MALA's best acceptance in many dimensions (Roberts and Rosenthal 1998)
FIRST_STEP = 0.5  # of MALA, in lengths of the bounds
MOST_LEVELS = 10_000


class Particles(NamedTuple):
    """Weighted points of a distribution.

    Attributes:
        points: (N, D), float64.
        log_weights: (N,), float64; the weights sum to 1.
        log_z: estimate of the logarithm of the density's integral over the bounds.
        effective: effective sample size, see :func:`effective_size`.
    """

    points: Tensor
    log_weights: Tensor
    log_z: float
    effective: float


def effective_size(log_weights: Tensor, ancestors: Tensor | None = None) -> float:
    """Return 1 / sum_k W_k^2, W_k being the weight of all particles that descend from the k-th first one.

    Without resampling each particle is its own ancestor, and this is 1 / sum w^2. With it, N W_k - 1 estimates the
    k-th first particle's part in the error of the normalising constant (Chan and Lai 2013, Lee and Whiteley 2018): the
    relative variance of the estimate of Z is about 1 / effective - 1 / N.

    It is not the number of independent samples that a mode's share is worth. With modes of like width, found alike, the
    two are near; a narrow mode stems from few first particles, and its share may have several times the variance. What
    tells is a second seed, or more particles.

    Args:
        log_weights: (N,), normalised.
        ancestors: index (N,) of the first particle that each descends from.

    Example:
        >>> w = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
        >>> round(effective_size(w), 4), round(effective_size(w, torch.tensor([0, 0, 2])), 4)
        (2.6667, 1.6)
    """
    weights = log_weights.exp()
    if ancestors is not None:
        weights = torch.zeros_like(weights).index_add(0, ancestors, weights)
    return 1 / float(weights.square().sum())


class Pool:
    """Weighted points as a distribution: samples are drawn from them with replacement.

    Args:
        points: (N, D).
        weights: (N,), of any sum; equal ones if left out.

    Example:
        >>> pool = Pool(np.array([[1.0], [2.0], [3.0]]), np.array([1.0, 0.0, 1.0]))
        >>> pool.at(np.array([0.0, 0.49, 0.51])).tolist()
        [[1.0], [1.0], [3.0]]
    """

    # arrays, since processes that draw ahead are sent them
    def __init__(self, points: Array, weights: Array | None = None) -> None:
        edges = np.arange(1, len(points) + 1) / len(points) if weights is None else np.cumsum(weights / weights.sum())
        self.points, self.edges = points, edges

    @classmethod
    def of(cls, particles: Particles) -> Pool:
        """Return the pool of weighted particles."""
        return cls(particles.points.numpy(), particles.log_weights.exp().numpy())

    def at(self, uniform: Array) -> Array:
        """Map uniforms on [0, 1) (...) to points (..., D): the inverse of the cumulative weights."""
        # the last edge may be rounded to less than 1
        chosen = np.searchsorted(self.edges, uniform, side="right").clip(max=len(self.points) - 1)
        found: Array = self.points[chosen]
        return found


def log_density(target: Target, x: Tensor) -> Tensor:
    """Return log p (N,) at points (N, D), float64, asked for in pieces.

    Raises:
        ToyError: it is NaN or +inf somewhere.
    """
    value = torch.cat([target.log_prob(rows).double() for rows in torch.split(x, CHUNK)])
    check_values(target, value)
    return value


def density_and_gradient(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p (N,) and its gradient (N, D) at points (N, D), float64; a gradient that is none is NaN.

    Raises:
        ToyError: log p is NaN or +inf somewhere, or has no gradient.
    """
    values, gradients = [], []
    # a validation runs without gradients
    with torch.inference_mode(False), torch.enable_grad():
        for rows in torch.split(x, CHUNK):
            at = rows.clone().requires_grad_(True)
            value = target.log_prob(at)
            require(
                value.requires_grad,
                f"--data.target: {type(target).__name__}.log_prob is not differentiable; give --data.sampler "
                "ImportanceResampling, or compute it by torch from its argument",
            )
            gradients.append(torch.autograd.grad(value.sum(), at)[0])
            values.append(value.detach().double())
    found = torch.cat(values)
    check_values(target, found)
    return found, torch.cat(gradients)


def check_values(target: Target, value: Tensor) -> None:
    """Refuse a log-density that is NaN or +inf somewhere."""
    wrong = value.isnan() | (value == torch.inf)
    require(not bool(wrong.any()), f"--data.target: {type(target).__name__}.log_prob is NaN or inf within its bounds")


class Sampler:
    """Draws samples of a density. A class of somebody's own gives :meth:`draw`."""

    def draw(self, target: Target, seed: int, stream: str) -> Particles:
        """Return weighted particles of ``target`` within its bounds.

        Args:
            target: the distribution, by ``log_prob``, ``bounds`` and ``dim``.
            seed: with ``stream`` the key of every random number.
            stream: name of the use; another one gives independent particles.

        Raises:
            ToyError: the density cannot be sampled so.
        """
        raise NotImplementedError


class ImportanceResampling(Sampler):
    """Uniform points of the bounds, weighted by the density; a sample is one of them, by weight.

    Self-normalised importance resampling (Rubin 1987). For narrow modes, or in many dimensions, few points have a
    weight to speak of: the effective sample size says so.

    Args:
        draws: number of points.
    """

    def __init__(self, draws: int = 2**18) -> None:
        bounded("--data.sampler.draws", draws, 100, 2**24)
        self.draws = draws

    @torch.no_grad()
    def draw(self, target: Target, seed: int, stream: str) -> Particles:
        """See :meth:`Sampler.draw`."""
        low, high = target.box()
        g = keyed_generator(seed, 0, f"sampler/{stream}")
        x = low + (high - low) * torch.from_numpy(g.random((self.draws, target.dim)))
        value = log_density(target, x)
        total = torch.logsumexp(value, 0)
        require_support(target, value)
        log_weights = value - total
        log_z = float(total) - math.log(self.draws) + float((high - low).log().sum())
        return Particles(x, log_weights, log_z, effective_size(log_weights))


class AnnealedMala(Sampler):
    """Particles that go from the uniform distribution over the bounds to the density p, along p^beta.

    Sequential Monte Carlo (Del Moral, Doucet and Jasra 2006): beta grows from 0 to 1 in steps that keep the weights
    effective; particles are resampled by their weights, and moved by the Metropolis-adjusted Langevin algorithm at
    p^beta, whose step size follows the acceptance of the moves before. Proposals out of the bounds are rejected.

    Args:
        particles: number of particles.
        moves: of each particle at a level.
        share: effective share of the particles that a step of beta leaves.
    """

    def __init__(self, particles: int = 2**14, moves: int = 3, share: float = 0.9) -> None:
        bounded("--data.sampler.particles", particles, 100, 2**22)
        bounded("--data.sampler.moves", moves, 1, REPEATS)
        bounded("--data.sampler.share", share, 0.01, 0.99)
        self.particles, self.moves, self.share = particles, moves, share

    @torch.no_grad()
    def draw(self, target: Target, seed: int, stream: str) -> Particles:
        """See :meth:`Sampler.draw`."""
        low, high = target.box()
        n, D, width = self.particles, target.dim, high - low
        g = keyed_generator(seed, 0, f"sampler/{stream}")
        x = low + width * torch.from_numpy(g.random((n, D)))
        value, grad = density_and_gradient(target, x)
        require_support(target, value)
        log_z, beta, step = float(width.log().sum()), 0.0, FIRST_STEP
        ancestors = torch.arange(n)
        for _ in range(MOST_LEVELS):
            after = next_beta(value, beta, self.share)
            log_weights = (after - beta) * value
            log_z += float(torch.logsumexp(log_weights, 0)) - math.log(n)
            kept = systematic_resampling(log_weights.softmax(0), g.random())
            x, value, grad, ancestors, beta = x[kept], value[kept], grad[kept], ancestors[kept], after
            for _ in range(self.moves):
                noise, uniform = torch.from_numpy(g.standard_normal((n, D))), torch.from_numpy(g.random(n))
                x, value, grad, accepted = mala_move(target, beta, step * width, (x, value, grad), noise, uniform)
                step = min(1.0, step * math.exp(accepted - ACCEPTED))
            if beta >= 1:
                log_weights = torch.full((n,), -math.log(n), dtype=torch.float64)
                return Particles(x, log_weights, log_z, effective_size(log_weights, ancestors))
        raise ToyError(f"--data.target: {type(target).__name__} is not reached in {MOST_LEVELS} levels of p^beta")


def require_support(target: Target, value: Tensor) -> None:
    """Refuse a density that is 0 at every point, (N,)."""
    found = bool(value.isfinite().any())
    require(found, f"--data.target: {type(target).__name__} has no density at any of {len(value)} points of its bounds")


def next_beta(value: Tensor, beta: float, share: float) -> float:
    """Return the largest beta' <= 1 whose weights p^(beta' - beta) leave ``share`` of the particles effective.

    Particles without a density, which only the first level has, do not count.

    Args:
        value: log p of the particles (N,).
        beta: of the level before.
        share: in (0, 1).
    """
    value = value[value.isfinite()]
    wanted = math.log(share * len(value))

    def log_effective(by: float) -> float:
        w = by * value
        return float(2 * torch.logsumexp(w, 0) - torch.logsumexp(2 * w, 0))

    most = 1 - beta
    if log_effective(most) >= wanted:
        return 1.0
    low, high = 0.0, most  # of beta' - beta
    while high - low > 1e-3 * low:
        middle = (low + high) / 2
        if middle in (low, high) or beta + middle == beta:
            raise ToyError("--data.target: log_prob ranges too widely for p^beta; give a smoother density")
        low, high = (middle, high) if log_effective(middle) >= wanted else (low, middle)
    return beta + low


def systematic_resampling(weights: Tensor, uniform: float) -> Tensor:
    """Return the indices (N,) of a resample in which each particle has N w or so copies, floor or ceiling of it.

    Args:
        weights: (N,), of sum 1.
        uniform: one number on [0, 1).

    Example:
        >>> systematic_resampling(torch.tensor([0.5, 0.1, 0.4]), 0.4).tolist()
        [0, 0, 2]
    """
    n = len(weights)
    at = (torch.arange(n, dtype=torch.float64) + uniform) / n
    return torch.searchsorted(weights.double().cumsum(0), at, right=True).clamp(max=n - 1)


State = tuple[Tensor, Tensor, Tensor]  # points (N, D), log p (N,) and its gradient (N, D)


def mala_move(
    target: Target, beta: float, step: Tensor, state: State, noise: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Move particles by one Metropolis-adjusted Langevin step at the density p^beta on the bounds.

    Proposed is x + h^2 / 2 beta grad log p + h xi, and accepted by the ratio of p^beta and of the proposals' densities.

    Args:
        target: p.
        beta: the power.
        step: h of each coordinate (D,).
        state: of the particles.
        noise: xi, standard normals (N, D).
        uniform: on [0, 1), (N,).

    Returns:
        the new state, and the share of proposals that were accepted.
    """
    x, value, grad = state
    low, high = target.box()
    drift = 0.5 * beta * step.square()
    new = x + drift * grad + step * noise
    inside = ((new >= low) & (new <= high)).all(-1)
    new = torch.where(inside.unsqueeze(-1), new, x)
    new_value, new_grad = density_and_gradient(target, new)
    back = (x - new - drift * new_grad) / step
    forth = (new - x - drift * grad) / step
    ratio = beta * (new_value - value) - 0.5 * (back.square().sum(-1) - forth.square().sum(-1))
    accepted = inside & (uniform.log() < ratio)  # NaN, of a gradient that is none, is not accepted
    kept = accepted.unsqueeze(-1)
    return (
        torch.where(kept, new, x),
        torch.where(accepted, new_value, value),
        torch.where(kept, new_grad, grad),
        float(accepted.double().mean()),
    )


def sampled_entropy(particles: Particles, target: Target) -> float:
    """Return log Z - E log p, the entropy in nats of p within its bounds, estimated by weighted particles."""
    value = target.log_prob(particles.points).double()
    weights = particles.log_weights.exp()
    # what has no weight has log p = -inf
    return particles.log_z - float(torch.where(weights > 0, weights * value, torch.zeros_like(value)).sum())
