"""Markov kernels: (noise, state, target) to (state, info). Chains are along the last axis B, coordinates before.

Info says whether each chain's proposal was accepted. Samplers count what a step costs, alike for all.
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

from lightning_toys.mirror_descent.compiled_kernels import box_muller, uniforms_from_words
from lightning_toys.training.compiling import kept_compiled
from lightning_toys.training.noise import keyed_bits, sent

Array = NDArray[np.float64]
# chains that share a generator: enough that Python costs little, few enough that what they need stays in the cache
BLOCK_SIZE = 2**15


class Noise:
    """Random numbers of blocks of chains side by side; each is a function of its block's key and of the order of calls.

    Random words of SFC64, turned into normals by the Box-Muller transform in torch, which vectorises: a third of the
    time of ``Generator.standard_normal``. The words are always drawn on the CPU and turned into numbers on the device:
    devices see the same numbers up to roundings. In float32 normals end at 5.8 standard deviations (a true normal
    exceeds that with probability 1e-8).

    B below is BLOCK_SIZE times the number of blocks.

    Args:
        keys: (seed of the replica, index of the block), one a block.
        stream: name of the use; different names give independent numbers.
        like: a tensor with the dtype and device wanted.
        compiled: whether float32 numbers come from compiled code, which rounds a little differently.
    """

    prefetch = 4  # rows drawn at once: a row's arithmetic costs little more than Python's calls

    def __init__(self, keys: Sequence[tuple[int, int]], stream: str, like: Tensor, compiled: bool = False) -> None:
        self.bits, self.like = [keyed_bits(*key, stream) for key in keys], like
        self.compiled = compiled and like.dtype == torch.float32
        self.buffers: dict[str, tuple[Tensor, int]] = {}

    @property
    def blocks(self) -> int:
        """Number of blocks side by side."""
        return len(self.bits)

    def uniform(self, rows: int = 1) -> Tensor:
        """Return uniforms (rows, B) in [0, 1); the caller may write into them."""
        return self.take("uniform", self.draw_uniform, rows)

    def uniforms_of_groups(self, groups: int) -> Tensor:
        """Return a uniform for each of ``groups`` groups of every block, block by block: (blocks * groups,)."""
        return self.uniform().view(self.blocks, BLOCK_SIZE)[:, :groups].flatten()

    def normal(self, rows: int = 1) -> Tensor:
        """Return standard normals (rows, B); the caller may write into them."""
        return self.take("normal", self.draw_normal, rows)

    def take(self, kind: str, draw: Callable[[int], Tensor], rows: int) -> Tensor:
        """Return the next ``rows`` rows of a buffer of numbers, which is filled again when it runs out."""
        drawn, used = self.buffers.get(kind, (self.like, self.prefetch))
        if used + rows > self.prefetch:
            drawn, used = draw(max(self.prefetch, rows)), 0
        self.buffers[kind] = drawn, used + rows
        return drawn[used : used + rows]

    def draw_uniform(self, rows: int) -> Tensor:
        """Draw uniforms (rows, B)."""
        if self.compiled:
            return kept_compiled(uniforms_from_words)(self.words(rows))
        integers, scale = self.centred_integers(rows)
        return torch.add(integers.new_full((), 0.5), integers, alpha=scale)

    def draw_normal(self, rows: int) -> Tensor:
        """Draw standard normals (rows, B)."""
        if self.compiled:
            return kept_compiled(box_muller)(self.words(rows).view(-1, BLOCK_SIZE)).view(rows, -1)
        integers, scale = self.centred_integers(rows)
        halves = integers.view(-1, 2, BLOCK_SIZE // 2)
        first, angle = halves.unbind(1)
        # the logarithm of (0, 1]; an angle in [-pi, pi)
        radius = torch.add(integers.new_full((), 0.5 + scale), first, alpha=scale).log_().mul_(-2.0).sqrt_()
        angle = angle * (2 * math.pi * scale)
        out = torch.empty_like(halves)
        torch.mul(radius, angle.cos(), out=out[:, 0])
        torch.mul(radius, angle.sin(), out=out[:, 1])
        return out.view(rows, -1)

    def centred_integers(self, rows: int) -> tuple[Tensor, float]:
        """Return equally likely integers (rows, B) as floats, and the factor that scales them to [-1/2, 1/2)."""
        if self.like.dtype == torch.float64:
            return (self.words64(rows, BLOCK_SIZE) >> 11).double(), 2.0**-53
        return (self.words(rows) >> 8).float(), 2.0**-24

    def words(self, rows: int) -> Tensor:
        """Return random words of 32 bits (rows, B)."""
        return self.words64(rows, BLOCK_SIZE // 2).view(torch.int32)

    def words64(self, rows: int, n: int) -> Tensor:
        """Return random words of 64 bits on the device (rows, blocks * n), each block's from its own generator."""
        if self.blocks == 1:  # without the copy
            return sent(self.bits[0].random_raw(rows * n).view(np.int64), self.like.device).view(rows, n)
        out = torch.empty(rows, self.blocks, n, dtype=torch.int64, pin_memory=self.like.device.type == "cuda")
        columns = out.numpy().view(np.uint64)

        def fill(block: int) -> None:
            columns[:, block] = self.bits[block].random_raw(rows * n).reshape(rows, n)

        list(thread_pool().map(fill, range(self.blocks)))
        return out.view(rows, -1).to(self.like.device, non_blocking=True)


@functools.cache
def thread_pool() -> ThreadPoolExecutor:
    """Return the threads that draw words of several blocks at once; generators release the interpreter lock."""
    return ThreadPoolExecutor(min(16, cores()))


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# a target: x (D, B) to (log density up to a constant (B,), its gradient (D, B))
Target = Callable[[Tensor], tuple[Tensor, Tensor]]


class State(NamedTuple):
    """State of chains: x (D, B), the log density log_p (B,) there and its gradient grad (D, B)."""

    x: Tensor
    log_p: Tensor
    grad: Tensor


class Info(NamedTuple):
    """What a step did: accepted (B,), 0 or 1."""

    accepted: Tensor


def init_state(x: Tensor, target: Target) -> State:
    """Return the state of chains at x (D, B)."""
    return State(x, *target(x))


def ula(noise: Noise, x: Tensor, grad: Tensor, eta: float) -> Tensor:
    """Take an unadjusted Langevin step: x + eta grad + sqrt(2 eta) xi, for x and grad (D, B)."""
    return torch.add(x, grad, alpha=eta).add_(noise.normal(x.shape[0]), alpha=math.sqrt(2 * eta))


def mala(noise: Noise, state: State, target: Target, eta: float) -> tuple[State, Info]:
    """Take a Metropolis-adjusted Langevin step (Roberts and Tweedie 1996).

    x' = x + eta grad log p(x) + sqrt(2 eta) xi, accepted with probability min(1, p(x') q(x | x') / (p(x) q(x' | x))).
    """
    new, info = langevin_proposal(noise, state, target, eta)
    return select_state(info.accepted, new, state), info


def langevin_proposal(noise: Noise, state: State, target: Target, eta: float) -> tuple[State, Info]:
    """Return MALA's proposal, and whether it is accepted.

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
    return new, Info(accept(noise, log_ratio))


def accept(noise: Noise, log_ratio: Tensor) -> Tensor:
    """Return 1 with probability min(1, exp(log_ratio)), else 0 (B,); floats, since bools would cost twice as much.

    ``log_ratio`` (B,) is written over.
    """
    return torch.lt(noise.uniform()[0], log_ratio.exp_(), out=torch.empty_like(log_ratio))


def independence_mh(noise: Noise, state: State, proposal: State, log_ratio: Tensor) -> tuple[State, Info]:
    """Take an independence Metropolis-Hastings step (Tierney 1994): accept with probability min(1, exp(log_ratio)).

    ``log_ratio`` (B,) is the difference of the log importance weights of proposal and state; it is written over.
    """
    accepted = accept(noise, log_ratio)
    return select_state(accepted, proposal, state), Info(accepted)


def select_state(accepted: Tensor, new: State, old: State) -> State:
    """Return the new state where accepted (B,) is 1, the old one where it is 0; values must be finite."""
    return State(*(torch.lerp(b, a, accepted) for a, b in zip(new, old, strict=True)))


def select(accepted: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return new values where accepted is 1, old ones where it is 0; lerp is exact there, and faster than where."""
    return torch.lerp(old, new, accepted)


def gaussian_target(mean: float, precision: float) -> Target:
    """Return the target N(mean, 1 / precision) of one coordinate x (1, B)."""

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        difference = x - mean
        gradient = difference * -precision
        return torch.addcmul(x.new_zeros(()), difference, gradient, value=0.5)[0], gradient

    return target


def times_standard_normal(target_x: Target) -> Target:
    """Return the target of (x, u) (2, B): ``target_x`` in x times a standard normal in u."""

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        log_p, gradient = target_x(x[:1])
        return log_p - 0.5 * x[1].square(), torch.cat([gradient, -x[1:]])

    return target


# exact distributions


def mala_transition_matrix(
    grid: Array, log_p: Array, grad: Array, eta: float, acceptance: Callable[[Array], Array] | None = None
) -> Array:
    """Return MALA's transition probabilities P_ij between the points of an evenly spaced grid (n,).

    Proposals are the Langevin density at the points, times the spacing; rejected proposals, and those off the grid,
    stay. In detailed balance with exp(log_p) on the grid exactly, whatever the spacing.

    Args:
        grid: evenly spaced points (n,).
        log_p: log density there (n,), up to a constant.
        grad: its derivative (n,).
        eta: step size.
        acceptance: probability of acceptance as a function of the log ratio; min(1, exp) if left out.

    Raises:
        ValueError: the grid is coarser than the standard deviation of the proposals.
    """
    h, std = grid[1] - grid[0], math.sqrt(2 * eta)
    if h > std:
        raise ValueError(f"a grid of spacing {h:.3g} is too coarse for proposals of standard deviation {std:.3g}")
    mean = grid + eta * grad
    log_q = -np.square(grid[None, :] - mean[:, None]) / (4 * eta) + math.log(h / math.sqrt(4 * math.pi * eta))
    log_ratio = log_p[None, :] - log_p[:, None] + log_q.T - log_q
    P: Array = np.exp(log_q + np.minimum(0.0, log_ratio))
    if acceptance is not None:
        P = np.exp(log_q) * acceptance(log_ratio)
    np.fill_diagonal(P, 0.0)
    P[np.diag_indices_from(P)] = 1.0 - P.sum(1)
    return P
