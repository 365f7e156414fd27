"""Markov kernels: (noise, state, target) to (state, info). Chains are along the last axis, coordinates before.

Info says whether each chain's proposal was taken. What a step costs is counted by the samplers, alike for all.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_toys.mirror_descent.fused import normals_of, uniforms_of
from lightning_toys.training.compiling import kept_compiled
from lightning_toys.training.noise import keyed_bits, sent

Array = NDArray[np.float64]
BLOCK = 2**15  # chains that share a generator: enough that Python costs little, and what they need stays in the cache


class Noise:
    """Random numbers of blocks of chains side by side; each a function of its key and of the order of calls.

    Raw words of SFC64, turned into normals by Box and Muller's transform in torch, which vectorises: a third of the
    time of ``Generator.standard_normal``. The words are made on the CPU in any case, and turned into numbers where they
    are wanted: devices see the same ones up to roundings. In float32 they end at 5.8 standard deviations (1e-8 of them
    would lie beyond).

    B below is BLOCK times the number of blocks.

    Args:
        keys: seed of the replica and index of the block, for each block.
        stream: name of the use.
        like: gives dtype and device.
        compiled: whether float32 numbers are made by compiled code, which rounds a little differently.
    """

    ahead = 4  # rows drawn at once: a row's arithmetic costs little more than Python's calls

    def __init__(self, keys: Sequence[tuple[int, int]], stream: str, like: Tensor, compiled: bool = False) -> None:
        self.bits, self.like = [keyed_bits(*key, stream) for key in keys], like
        self.compiled = compiled and like.dtype == torch.float32
        self.stock: dict[str, tuple[Tensor, int]] = {}

    @property
    def blocks(self) -> int:
        """How many blocks lie side by side."""
        return len(self.bits)

    def uniform(self, rows: int = 1) -> Tensor:
        """Return uniforms (rows, B) in [0, 1); the caller may write into them."""
        return self.next("uniform", self.draw_uniform, rows)

    def uniforms_of_groups(self, groups: int) -> Tensor:
        """Return a uniform for each of ``groups`` groups of every block (blocks * groups,), block by block."""
        return self.uniform().view(self.blocks, BLOCK)[:, :groups].flatten()

    def normal(self, rows: int = 1) -> Tensor:
        """Return standard normals (rows, B); the caller may write into them."""
        return self.next("normal", self.draw_normal, rows)

    def next(self, law: str, draw: Callable[[int], Tensor], rows: int) -> Tensor:
        """Return ``rows`` rows of what was drawn ahead, and draw again when they run out."""
        drawn, used = self.stock.get(law, (self.like, self.ahead))
        if used + rows > self.ahead:
            drawn, used = draw(max(self.ahead, rows)), 0
        self.stock[law] = drawn, used + rows
        return drawn[used : used + rows]

    def draw_uniform(self, rows: int) -> Tensor:
        """Draw uniforms (rows, B)."""
        if self.compiled:
            return kept_compiled(uniforms_of)(self.words(rows))
        drawn, grain = self.grains(rows)
        return torch.add(drawn.new_full((), 0.5), drawn, alpha=grain)

    def draw_normal(self, rows: int) -> Tensor:
        """Draw standard normals (rows, B)."""
        if self.compiled:
            return kept_compiled(normals_of)(self.words(rows).view(-1, BLOCK)).view(rows, -1)
        drawn, grain = self.grains(rows)
        halves = drawn.view(-1, 2, BLOCK // 2)
        first, angle = halves.unbind(1)
        # the logarithm of (0, 1]; an angle in [-pi, pi)
        radius = torch.add(drawn.new_full((), 0.5 + grain), first, alpha=grain).log_().mul_(-2.0).sqrt_()
        angle = angle * (2 * math.pi * grain)
        out = torch.empty_like(halves)
        torch.mul(radius, angle.cos(), out=out[:, 0])
        torch.mul(radius, angle.sin(), out=out[:, 1])
        return out.view(rows, -1)

    def grains(self, rows: int) -> tuple[Tensor, float]:
        """Return whole numbers (rows, B) as floats, all alike, and the factor that takes them to [-1/2, 1/2)."""
        if self.like.dtype == torch.float64:
            return (self.raw(rows, BLOCK) >> 11).double(), 2.0**-53
        return (self.words(rows) >> 8).float(), 2.0**-24

    def words(self, rows: int) -> Tensor:
        """Return raw words of 32 bits (rows, B)."""
        return self.raw(rows, BLOCK // 2).view(torch.int32)

    def raw(self, rows: int, n: int) -> Tensor:
        """Return raw words of 64 bits on the device (rows, blocks * n), each block's from its own generator."""
        if self.blocks == 1:  # without the copy
            return sent(self.bits[0].random_raw(rows * n).view(np.int64), self.like.device).view(rows, n)
        out = torch.empty(rows, self.blocks, n, dtype=torch.int64, pin_memory=self.like.device.type == "cuda")
        columns = out.numpy().view(np.uint64)

        def fill(block: int) -> None:
            columns[:, block] = self.bits[block].random_raw(rows * n).reshape(rows, n)

        list(threads().map(fill, range(self.blocks)))
        return out.view(rows, -1).to(self.like.device, non_blocking=True)


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Return the threads that draw words of several blocks at once: the generators work without the interpreter."""
    return ThreadPoolExecutor(min(16, cores()))


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    """Return MALA's proposal, and whether it is taken.

    With w = grad log p(x) + grad log p(x') and h = sqrt(eta / 2), the log ratio of the proposal densities,
    (|xi|^2 - |x - x' - eta grad log p(x')|^2 / (2 eta)) / 2, is -h w . (xi + h w / 2).
    """
    xi, half = noise.normal(state.x.shape[0]), math.sqrt(eta / 2)
    proposal = torch.add(state.x, state.grad, alpha=eta).add_(xi, alpha=2 * half)
    new = State(proposal, *target(proposal))
    w = state.grad + new.grad
    log_ratio = new.log_p - state.log_p
    for row, z in zip(w, xi.add_(w, alpha=half / 2), strict=True):
        log_ratio.addcmul_(row, z, value=-half)
    return new, Info(decide(noise, log_ratio))


def decide(noise: Noise, log_ratio: Tensor) -> Tensor:
    """Return 1 with probability min(1, exp(log_ratio)), else 0: floats, since bools would cost twice as much."""
    return torch.lt(noise.uniform()[0], log_ratio.exp_(), out=torch.empty_like(log_ratio))


def independence(noise: Noise, state: State, proposal: State, log_weight: Tensor) -> tuple[State, Info]:
    """Take an independence Metropolis-Hastings step: the proposal, with probability min(1, exp(log_weight))."""
    taken = decide(noise, log_weight)
    return choose(taken, proposal, state), Info(taken)


def choose(taken: Tensor, new: State, old: State) -> State:
    """Return the new state where it is taken; values must be finite."""
    return State(*(torch.lerp(b, a, taken) for a, b in zip(new, old, strict=True)))


def select(taken: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return new values where they are taken (0 or 1); lerp is exact there, and three times faster than where."""
    return torch.lerp(old, new, taken)


def gaussian(mean: float, precision: float) -> Target:
    """Return the target N(mean, 1 / precision) of one coordinate."""

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        away = x - mean
        gradient = away * -precision
        return torch.addcmul(x.new_zeros(()), away, gradient, value=0.5)[0], gradient

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
