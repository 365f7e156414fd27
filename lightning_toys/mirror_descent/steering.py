"""Steering without gradients: Feynman-Kac potentials, and the best of M by soft value. Untilted reverse kernels only.

With x_k at the levels of ``smc_K``, noisy to clean, r_k = lambda Q(E[a_0 | x_k]) stands for the soft value of x_k.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_toys.errors import REPEATS, bounded, check_settings
from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample
from lightning_toys.mirror_descent.joint_distribution import without_rows
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise
from lightning_toys.mirror_descent.problem import Cost, Problem
from lightning_toys.mirror_descent.resampling import Resampling, Systematic
from lightning_toys.mirror_descent.reverse_process import log_snr_levels
from lightning_toys.mirror_descent.sampler import Draws, Sampler
from lightning_toys.mirror_descent.samplers import z_check


class Potential(ABC):
    """Intermediate potentials G_k of FK steering: a base class for potentials of your own, given by class_path.

    G of the last level makes up for all before, so that their product is exp(r) of the clean sample: any potential has
    the tilted target for its limit.

    Attributes:
        name: part of the sampler's name; the class's name if left out.
        near_limit: whether some hundred particles are near the limit, so that draws are tested against it.
    """

    name: str = ""
    near_limit: bool = True

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def start(self, r: Tensor) -> Tensor:
        """Return the memory before the noisiest level, of the shape of r."""

    @abstractmethod
    def step(self, memory: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return log G of a level and the new memory, given the memory of the level before and r."""


class Difference(Potential):
    """log G_k = r_k - r_(k - 1)."""

    name = "difference"

    def start(self, r: Tensor) -> Tensor:
        """See :meth:`Potential.start`."""
        return torch.zeros_like(r)

    def step(self, memory: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Potential.step`."""
        return r - memory, r


class Max(Potential):
    """log G_k = the largest r so far."""

    name = "max"

    def start(self, r: Tensor) -> Tensor:
        """See :meth:`Potential.start`."""
        return torch.full_like(r, -math.inf)

    def step(self, memory: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Potential.step`."""
        largest = torch.maximum(memory, r)
        return largest, largest


class Sum(Potential):
    """log G_k = the sum of all r so far: weights so uneven that hundreds of particles are far from the limit."""

    name = "sum"
    near_limit = False

    def start(self, r: Tensor) -> Tensor:
        """See :meth:`Potential.start`."""
        return torch.zeros_like(r)

    def step(self, memory: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Potential.step`."""
        return memory + r, memory + r


class Steering(Sampler):
    """The reverse process by exact untilted kernels, from which steered samplers choose."""

    family = "steering"
    num_traced = 0

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.levels = [problem.joint.level(float(x)) for x in log_snr_levels(problem.settings.smc_K)]
        self.steps = len(self.levels) - 1
        self.Q: Any = problem.joint.clean.value_of(problem.reward)

    def value(self, k: int, x: Tensor) -> Tensor:
        """Return r_k (B,), in double, at x (D, B) of level k."""
        level, d = self.levels[k], self.problem.joint.action_dim
        a0 = x[:d]
        if level.abar < 1:
            S = self.problem.model.score(level, x)
            a0 = (a0 + (1 - level.abar) * S[:d]) / math.sqrt(level.abar)
        r: Tensor = self.problem.lambda_scale * self.Q.value(a0.double())
        return r

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions and next states of x (D, B)."""
        d = self.problem.joint.action_dim
        return without_rows(x[:d]), without_rows(x[d:])


class ParticleSteering(Steering, ABC):
    """Steered particles that carry weights, and are resampled when these are uneven.

    Particles are resampled when their effective sample size falls below ``ess_threshold`` of ``smc_particles``. A block
    holds BLOCK_SIZE / smc_particles independent runs. ``extra`` has each run's ``log_z``, final ``ess_fraction`` and
    number of resamplings, ``resampled``.

    Args:
        problem: the sampling problem.
        resampling: the scheme's class.
    """

    whole_groups = True

    def __init__(self, problem: Problem, resampling: Callable[[], Resampling] = Systematic) -> None:
        super().__init__(problem)
        self.resampling, self.group = resampling(), problem.settings.smc_particles

    @abstractmethod
    def first_weights(self, x: Tensor, runs: int) -> tuple[Tensor, Sequence[Tensor]]:
        """Return log weights (runs, n), in double, at x (D, runs n) of the noisiest level, and a memory of such."""

    @abstractmethod
    def advance(
        self, noise: Noise, k: int, x: Tensor, memory: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Return x (D, runs n) at level k + 1 given x at level k, what is added to log weights, and the new memory."""

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        s, dim = self.problem.settings, self.problem.joint.dim
        n, runs = s.smc_particles, noise.blocks * (BLOCK_SIZE // s.smc_particles)
        resampling = self.resampling
        x = self.problem.model.draw(noise, self.levels[0])
        log_w, memory = self.first_weights(x, runs)
        log_z, resampled = torch.zeros(runs, dtype=torch.float64, device=x.device), torch.zeros(runs)
        own = torch.arange(n, device=x.device)
        for k in range(self.steps):
            weight = torch.softmax(log_w, -1)
            low = 1 / (weight.square().sum(-1) * n) < s.ess_threshold
            uniform = resampling.uniforms(noise, runs, n)
            if bool(low.any()):
                resampled += low.cpu()
                kept = torch.where(low[:, None], resampling.indices(weight, uniform), own)
                x = x.view(dim, runs, n).gather(2, kept.expand(dim, runs, n)).flatten(1)
                memory = [v.gather(1, kept) for v in memory]
                log_z = torch.where(low, log_z + torch.logsumexp(log_w, -1) - math.log(n), log_z)
                log_w = torch.where(low[:, None], torch.zeros_like(log_w), log_w)
            x, log_g, memory = self.advance(noise, k, x, memory)
            log_w = log_w + log_g
        log_z = log_z + torch.logsumexp(log_w, -1) - math.log(n)
        weight = torch.softmax(log_w, -1)
        kept = resampling.indices(weight, resampling.uniforms(noise, runs, n))
        x = x.view(dim, runs, n).gather(2, kept.expand(dim, runs, n)).flatten(1)
        extra = {
            "log_z": log_z.tolist(),
            "ess_fraction": (1 / (weight.square().sum(-1) * n)).tolist(),
            "resampled": resampled.tolist(),
        }
        return Draws(*self.split(x), extra=extra)


class FKSteering(ParticleSteering):
    """Feynman-Kac steering (Singhal et al. 2025, arXiv 2501.06848): particles weighed by intermediate rewards.

    Proposals are the untilted kernels, weights the potentials. Exact as the particles grow, and unbiased in Z.

    Args:
        problem: the sampling problem.
        potential: its class.
        resampling: the scheme's class.
    """

    def __init__(
        self,
        problem: Problem,
        potential: Callable[[], Potential] = Difference,
        resampling: Callable[[], Resampling] = Systematic,
    ) -> None:
        super().__init__(problem, resampling)
        self.potential = potential()
        self.name = f"fk_{self.potential.name}"
        self.exact_in_the_limit = self.potential.near_limit

    def first_weights(self, x: Tensor, runs: int) -> tuple[Tensor, Sequence[Tensor]]:
        """See :meth:`ParticleSteering.first_weights`: the memory is the potential's, and log of all potentials."""
        r = self.value(0, x).view(runs, -1)
        log_w, memory = self.potential.step(self.potential.start(r), r)
        return log_w, (memory, log_w)

    def advance(
        self, noise: Noise, k: int, x: Tensor, memory: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """See :meth:`ParticleSteering.advance`."""
        past, paid = memory
        x = self.problem.model.draw_reverse(noise, self.levels[k], self.levels[k + 1], x)
        r = self.value(k + 1, x).view(paid.shape)
        log_g, past = self.potential.step(past, r)
        if k + 1 == self.steps:
            log_g = self.last_potential(log_g, r, paid)
        return x, log_g, (past, paid + log_g)

    def last_potential(self, log_g: Tensor, r: Tensor, paid: Tensor) -> Tensor:
        """Return log G of the clean level (runs, n): what makes the product exp(r), whatever the potential says."""
        return r - paid

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`: the kernel and the soft value share one evaluation of the score."""
        return Cost(prior=1, score=self.steps, value=self.steps + 1)

    def own_checks(self, samples: Sequence[Sample]) -> list[ClosedFormCheck]:
        """See :meth:`Sampler.own_checks`: Z, where its estimates are not a few large ones."""
        return [z_check(self, samples)] if self.exact_in_the_limit else []


class SVDD(Steering):
    """Soft value-based decoding (Li et al. 2024, arXiv 2408.08252), SVDD-PM: at each step the best of M by soft value.

    Of M draws of the untilted kernel one is kept, with probabilities proportional to exp(r). As M grows each step tends
    to the kernel tilted by exp(r) (its algorithm's soft optimal policy, alpha = 1 / lambda), which is the target's only
    where r is the exact soft value; with M = 1 nothing is tilted.

    Args:
        problem: the sampling problem.
        m: M.
        greedy: keep the one with the largest r, as alpha = 0 would.

    Raises:
        ToyError: M is out of bounds.
    """

    def __init__(self, problem: Problem, m: int = 8, greedy: bool = False) -> None:
        check_settings(SVDD, locals(), "--model.samplers: SVDD's ")
        bounded("--model.samplers: SVDD's m", m, 1, REPEATS)
        super().__init__(problem)
        self.m, self.greedy = m, greedy
        self.name = f"svdd_{'greedy_' * greedy}{m}"

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`: one of M by the Gumbel-max trick."""
        model = self.problem.model
        x = model.draw(noise, self.levels[0])
        for k in range(self.steps):
            best, score = self.candidate(noise, k, x)
            for _ in range(self.m - 1):
                other, found = self.candidate(noise, k, x)
                best = torch.where(found > score, other, best)
                score = torch.maximum(found, score)
            x = best
        return Draws(*self.split(x))

    def candidate(self, noise: Noise, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a draw (D, B) of level k's kernel at x, and r there, with Gumbel noise or not."""
        other = self.problem.model.draw_reverse(noise, self.levels[k], self.levels[k + 1], x)
        found = self.value(k + 1, other)
        if not self.greedy:
            found = found - (-noise.uniform()[0].double().clamp_min(1e-30).log()).log()
        return other, found

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`: a kernel takes the score that its candidate's soft value took."""
        n = self.steps
        return Cost(prior=1, score=1 + self.m * (n - 1), value=self.m * n)
