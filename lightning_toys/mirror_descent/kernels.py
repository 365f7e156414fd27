"""Markov kernels: (noise, state, target) to (state, info). Chains are along the last axis, coordinates before.

Info says whether each chain's proposal was taken. What a step costs is counted by the samplers, alike for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_toys.training.noise import keyed_generator

Array = NDArray[np.float64]
BLOCK = 2**15  # chains that share a generator: enough that Python costs little, and what they need stays in the cache


class Noise:
    """Random numbers of one block of chains: a function of (seed, block, stream), and of the order of the calls.

    Normals by Box and Muller's transform of Philox's uniforms, which vectorises: twice as fast as numpy's. Made on the
    CPU in any case, so that the device changes no chain. In float32 they end at 5.8 standard deviations (1e-8 of them
    would lie beyond).

    Args:
        seed: replica seed.
        block: index of the block of chains.
        stream: name of the use.
        like: gives dtype and device.
    """

    def __init__(self, seed: int, block: int, stream: str, like: Tensor) -> None:
        self.generator, self.like = keyed_generator(seed, block, stream), like
        self.kind = np.float64 if like.dtype == torch.float64 else np.float32

    def uniform(self, rows: int = 1) -> Tensor:
        """Return uniforms (rows, BLOCK) in [0, 1)."""
        drawn = self.generator.random((rows, BLOCK), dtype=self.kind)
        return torch.from_numpy(drawn).to(self.like.device, self.like.dtype)

    def normal(self, rows: int = 1) -> Tensor:
        """Return standard normals (rows, BLOCK)."""
        first, second = self.uniform(rows).view(rows, 2, BLOCK // 2).unbind(1)
        radius = torch.rsub(first, 1.0).log_().mul_(-2.0).sqrt_()  # the logarithm of (0, 1]
        angle = second.mul_(2 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)


# a target: x (D, B) to (log density up to a constant (B,), gradient (D, B))
Target = Callable[[Tensor], tuple[Tensor, Tensor]]


class State(NamedTuple):
    """Place of each chain, with the log density and gradient there."""

    x: Tensor
    log_p: Tensor
    grad: Tensor


class Info(NamedTuple):
    """What a step did: acceptance (B,), 0 or 1."""

    accepted: Tensor


def start(x: Tensor, target: Target) -> State:
    """Return the state of chains at x (D, B)."""
    return State(x, *target(x))


def ula(noise: Noise, x: Tensor, gradient: Tensor, eta: float) -> Tensor:
    """Take an unadjusted Langevin step: x + eta grad + sqrt(2 eta) xi."""
    return torch.add(x, gradient, alpha=eta).add_(noise.normal(x.shape[0]), alpha=math.sqrt(2 * eta))


def mala(noise: Noise, state: State, target: Target, eta: float) -> tuple[State, Info]:
    """Take a Metropolis-adjusted Langevin step (Roberts and Tweedie 1996).

    x' = x + eta grad log p(x) + sqrt(2 eta) xi, taken with probability min(1, p(x') q(x | x') / (p(x) q(x' | x))).
    """
    new, info = langevin_proposal(noise, state, target, eta)
    return choose(info.accepted, new, state), info


def langevin_proposal(noise: Noise, state: State, target: Target, eta: float) -> tuple[State, Info]:
    """Return MALA's proposal, and whether it is taken."""
    xi = noise.normal(state.x.shape[0])
    proposal = torch.add(state.x, state.grad, alpha=eta).add_(xi, alpha=math.sqrt(2 * eta))
    new = State(proposal, *target(proposal))
    back = torch.add(state.x - proposal, new.grad, alpha=-eta)
    log_ratio = new.log_p - state.log_p
    log_ratio.add_(squares(xi), alpha=0.5).sub_(squares(back), alpha=1 / (4 * eta))
    return new, Info(noise.uniform()[0].log_() < log_ratio)


def independence(noise: Noise, state: State, proposal: State, log_weight: Tensor) -> tuple[State, Info]:
    """Take an independence Metropolis-Hastings step: the proposal, with probability min(1, exp(log_weight))."""
    taken = noise.uniform()[0].log_() < log_weight
    return choose(taken, proposal, state), Info(taken)


def squares(x: Tensor) -> Tensor:
    """Return |x|^2 over the coordinates of x (D, B)."""
    return x[0].square() if len(x) == 1 else x.square().sum(0)


def choose(taken: Tensor, new: State, old: State) -> State:
    """Return the new state where it is taken; values must be finite."""
    share = taken.to(new.x.dtype)
    return State(*(torch.lerp(b, a, share) for a, b in zip(new, old, strict=True)))


def select(taken: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return new values where they are taken; lerp is exact at 0 and 1, and six times faster than where."""
    return torch.lerp(old, new, taken.to(new.dtype))


def gaussian(mean: float, precision: float) -> Target:
    """Return the target N(mean, 1 / precision) of one coordinate."""

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        away = x - mean
        gradient = away * -precision
        return (away[0] * gradient[0]).mul_(0.5), gradient

    return target


def with_standard_normal(first: Target) -> Target:
    """Return the target of (x, u): ``first`` in x, a standard normal in u."""

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        log_p, gradient = first(x[:1])
        return log_p - 0.5 * x[1].square(), torch.cat([gradient, -x[1:]])

    return target


# exact laws


def mala_matrix(grid: Array, log_p: Array, grad: Array, eta: float) -> Array:
    """Return MALA's transition probabilities P_ij between the points of an evenly spaced grid (n,).

    Proposals are the Langevin density at the points, times the spacing; what is refused, and what the grid misses,
    stays. In detailed balance with exp(log_p) on the grid exactly, whatever the spacing.
    """
    h, std = grid[1] - grid[0], math.sqrt(2 * eta)
    if h > std:
        raise ValueError(f"a grid of spacing {h:.3g} is too coarse for proposals of deviation {std:.3g}")
    mean = grid + eta * grad
    log_q = -np.square(grid[None, :] - mean[:, None]) / (4 * eta) + math.log(h / math.sqrt(4 * math.pi * eta))
    log_ratio = log_p[None, :] - log_p[:, None] + log_q.T - log_q
    P: Array = np.exp(log_q + np.minimum(0.0, log_ratio))
    np.fill_diagonal(P, 0.0)
    P[np.diag_indices_from(P)] = 1.0 - P.sum(1)
    return P
