"""What samplers are: the abstract class, what they return, and what they record and share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample
from lightning_toys.mirror_descent.joint import Gaussian
from lightning_toys.mirror_descent.joint_distribution import without_rows
from lightning_toys.mirror_descent.kernels import Noise
from lightning_toys.mirror_descent.problem import Cost, Problem

NUM_TRACED = 64  # chains of a block whose trace is kept
NUM_MONITORED = 1024  # chains of a block that acceptance rate and squared jumps are averaged over


@dataclass
class Draws:
    """What a sampler drew in some blocks of chains, side by side.

    Attributes:
        a: actions (B,), or (d_a, B) where they have several coordinates.
        s: next states, likewise.
        accepted: acceptance rate of each step in each block (T, blocks), or None.
        trace: actions of each block's traced chains after every step (T, blocks, W), or None.
        states: next states of the same chains (T, blocks, W), or None.
        squared_jumps: mean squared jump of the action in each step and block (T, blocks), or None.
        extra: other numbers, by name: one for each independent group of chains, block by block.
    """

    a: Tensor
    s: Tensor
    accepted: Tensor | None = None
    trace: Tensor | None = None
    squared_jumps: Tensor | None = None
    states: Tensor | None = None
    extra: dict[str, list[float]] | None = None


class Sampler(ABC):
    """A way of drawing (a, s') from the tilted target: a base class for samplers of your own, given by class_path.

    Chains are along the last axis B, in blocks of ``BLOCK_SIZE``. :meth:`draw` and :meth:`cost` are what a sampler has
    to give. Where its exact distribution is known too, :meth:`exact_distribution` or :meth:`exact_moments` says so (on
    mixtures :meth:`exact_distribution_on_mixtures`), and the run tests the draws against it; else against the target
    alone. The first argument of the constructor is the problem, the others are settings.

    Attributes:
        name: of its metrics (``joint_kl@NAME``) and part of the key of its noise; the class's name if left out.
        family: of samplers that figures show in one colour.
        num_traced: chains of a block whose trace is kept.
        group: draws within a group of this many depend on each other; 0: all are independent.
        stationary: whether all steps are of one Markov kernel, as R-hat and ESS assume.
        annealed: whether its steps go through ``problem.levels``, ``action_steps_per_level`` at each.
        reads_score: whether it reads ``problem.model``, so that a learned model makes a difference.
        whole_groups: whether there have to be chains for a whole group.
        linear_only: whether it needs closed forms that only the linear-Gaussian problem has.
        unadjusted: whether it takes Langevin steps of ``ula_step`` without a test, which run away where they are long.
        exact_in_the_limit: the draws tend to the target's as ``group`` grows, and are tested against that.

    Args:
        problem: the sampling problem, in coordinates in which q(a, s') has mean 0.
    """

    name: str = ""
    family: str = "of one's own"
    num_traced: int = NUM_TRACED
    group: int = 0
    stationary: bool = False
    annealed: bool = False
    reads_score: bool = True
    whole_groups: bool = False
    linear_only: bool = False
    unadjusted: bool = False
    exact_in_the_limit: bool = False

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def draw(self, noise: Noise) -> Draws:
        """Return draws of as many blocks as the noise has; all randomness is the noise's."""

    @abstractmethod
    def cost(self) -> Cost:
        """Return the evaluations per sample."""

    def exact_distribution(self) -> Gaussian | None:
        """Return the distribution of the draws, right or wrong, where it is Gaussian and so known exactly."""
        return None

    def exact_moments(self) -> dict[str, float]:
        """Return those moments of the draws that are known exactly: ``mean``, ``var``, ``slope``, ``cond_ratio``.

        See :func:`gaussian_moments`. By default those of :meth:`exact_distribution`.
        """
        x = self.problem.tilted_joint if self.exact_in_the_limit else self.exact_distribution()
        return {} if x is None else gaussian_moments(x, self.problem.linear_joint.sigma_sprime)

    def exact_distribution_on_mixtures(self) -> Any:
        """Return the distribution of the draws, a :class:`truth.Truth`, where it is known; else None."""
        return None

    def fast_steps(self) -> int:
        """Return how many steps of a chain compiled code takes as a whole; 0 where it would gain little."""
        return 0

    def why_unknown(self) -> str:
        """Return, before anything is drawn, why moments that could be known will not be; empty as a rule."""
        return ""

    def own_checks(self, samples: Sequence[Sample]) -> list[ClosedFormCheck]:
        """Return closed forms of its own beside the estimates of samples, one a seed."""
        return []


def gaussian_moments(x: Gaussian, sigma: float) -> dict[str, float]:
    """Return mean and variance of the action, slope of s' on it, and Var(s' | a) / sigma^2, by name."""
    return {
        "mean": float(x.m[0]),
        "var": float(x.C[0, 0]),
        "slope": x.rho,
        "cond_ratio": x.v / sigma**2,
    }


def refreshed_moments(problem: Problem, grid: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """Return the moments of draws whose action has the density p (n,) on an even grid (n,), s' drawn exactly given it.

    Deviations are taken from the middle of the grid: no digits are lost far from 0.
    """
    h, middle = float(grid[1] - grid[0]), float(grid[len(grid) // 2])
    x = grid - middle
    mean = float((x * p).sum() * h)
    var = float((np.square(x - mean) * p).sum() * h)
    return {"mean": middle + mean, "var": var, "slope": problem.linear_joint.alpha, "cond_ratio": 1.0}


class ChainRecorder:
    """Records acceptance, traces and jumps of some chains of each block.

    Args:
        num_traced: chains of a block whose trace is kept.
        blocks: number of blocks side by side.
    """

    def __init__(self, num_traced: int, blocks: int) -> None:
        self.kept, self.num_traced, self.blocks = max(num_traced, NUM_MONITORED), num_traced, blocks
        self.accepted: list[Tensor] = []
        self.trace: list[Tensor] = []

    def record(self, before: Tensor, after: Tensor, accepted: Tensor | None = None) -> None:
        """Record one step: actions (their first coordinate) before and after it, and 1 where accepted, each (B,)."""
        if not self.trace:
            self.trace.append(self.first_chains(before, self.kept))
        self.trace.append(self.first_chains(after, self.kept))
        if accepted is not None:
            self.accepted.append(self.first_chains(accepted, NUM_MONITORED))

    def first_chains(self, x: Tensor, n: int) -> Tensor:
        """Return a copy of the values x (B,) of each block's first n chains (blocks, n)."""
        return x.view(self.blocks, -1)[:, :n].clone()

    def draws(self, a: Tensor, s: Tensor) -> Draws:
        """Return the draws a and s, (B,) or rows (d, B), with what was recorded."""
        accepted = torch.stack(self.accepted).mean(-1) if self.accepted else None
        trace = torch.stack(self.trace)
        squared_jumps = trace[..., :NUM_MONITORED].diff(dim=0).square().mean(-1)
        kept = trace[1:, :, : self.num_traced] if self.num_traced else None
        return Draws(without_rows(a), without_rows(s), accepted, kept, squared_jumps)


class PairRecorder:
    """Records pairs (a, s') of some chains of each block, for animations; nothing where ``num_traced`` is 0.

    Args:
        num_traced: chains of a block whose pairs are kept.
        blocks: number of blocks side by side.
    """

    def __init__(self, num_traced: int, blocks: int) -> None:
        self.num_traced, self.blocks = num_traced, blocks
        self.pairs: tuple[list[Tensor], list[Tensor]] = ([], [])

    def record(self, a: Tensor, s: Tensor) -> None:
        """Record actions and next states, each (B,)."""
        if self.num_traced:
            for kept, x in zip(self.pairs, (a, s), strict=True):
                kept.append(x.view(self.blocks, -1)[:, : self.num_traced].clone())

    def traces(self) -> tuple[None, Tensor | None, None, Tensor | None]:
        """Return :class:`Draws`' accepted, trace, squared_jumps and states."""
        a, s = (torch.stack(kept) if kept else None for kept in self.pairs)
        return None, a, None, s
