"""Samplers that run the reverse process: SDE and ODE with each guidance rule, and twisted sequential Monte Carlo."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent.affine import Affine, Array, Law
from lightning_toys.mirror_descent.guidance import RULES, PosteriorSampling
from lightning_toys.mirror_descent.joint import Level
from lightning_toys.mirror_descent.kernels import BLOCK, Noise
from lightning_toys.mirror_descent.predictors import STEPS, log_snr_levels, plan
from lightning_toys.mirror_descent.predictors import start as starting_law
from lightning_toys.mirror_descent.samplers import Draws, Sampler, systematic
from lightning_toys.mirror_descent.world import Cost, World


def root(C: Array) -> Array:
    """Return a square root of a covariance that may have zeros on its diagonal."""
    half: Array = (np.linalg.cholesky(C) if np.all(np.diag(C) > 0) else np.sqrt(np.diag(np.diag(C)))).astype(np.float64)
    return half


def linear(A: Array, x: Tensor, b: Array | None = None) -> Tensor:
    """Return A x + b for x (2, B) and an A (2, 2) of numbers."""
    rows = [x[0] * float(row[0]) + x[1] * float(row[1]) for row in A]
    if b is not None:
        rows = [row + float(c) for row, c in zip(rows, b, strict=True)]
    return torch.stack(rows)


class Predictor(Sampler):
    """A guided reverse process. Its law is Gaussian, and known."""

    process: str
    rule: str

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.abars = log_snr_levels(world.settings.predictor_K)
        self.first = starting_law(world.joint, float(self.abars[0]))

    @cached_property
    def steps(self) -> list[Affine]:
        """Every step."""
        world = self.world
        rule = RULES[self.rule](world.joint, world.reward, world.strength)
        # the schedule's r runs over the process's own levels
        beta = [world.strength * world.schedule.share(float(x), float(self.abars[0])) for x in self.abars]
        at = dict(zip(self.abars.tolist(), beta, strict=True))
        return plan(world.joint, rule, at.__getitem__, self.abars.tolist(), STEPS[self.process])

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        x = linear(root(self.first.C), noise.normal(2), self.first.m)
        for step in self.steps:
            x = linear(step.A, x, step.b)
            if step.D[0, 0] > 0:
                x.add_(noise.normal(2), alpha=math.sqrt(step.D[0, 0]))
        return Draws(x[0], x[1])

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = len(self.steps)
        return Cost(prior=1, score=n, value=0 if self.rule == "none" else n, refresh=0)

    def law(self) -> Law:
        """See :meth:`Sampler.law`."""
        law = self.first
        for step in self.steps:
            law = law.after(step)
        return law


def predictor(process: str, rule: str) -> type[Predictor]:
    """Return the sampler of a process and a rule."""
    name = f"{process}_{rule}"
    return type(name, (Predictor,), {"name": name, "process": process, "rule": rule, "__doc__": Predictor.__doc__})


def posterior(low: Level, high: Level) -> Affine:
    """Return the exact law of x at ``high`` (cleaner) given x at ``low``: A x + b + N(0, D).

    x_low = g x_high + noise of variance 1 - g^2, g^2 = abar_low / abar_high.
    """
    g = math.sqrt(low.abar / high.abar)
    gain = g * high.C @ low.precision
    return Affine(gain, high.m - gain @ low.m, high.C - g * gain @ high.C)


class TwistedSMC(Sampler):
    """Twisted sequential Monte Carlo (Wu et al. 2023): exact as the number of particles grows, and unbiased in Z.

    Particles follow the untilted law's exact reverse kernel p, drawn towards the reward by the gradient of the twist
    psi_k(x) = exp(lambda Q(E[a_0 | x])) (DPS's), and weighed by p psi' / (psi proposal). Weights are carried, and the
    particles are resampled systematically when their effective share falls below ``ess_threshold``.
    """

    name = "smc_twisted"
    independent = False

    def __init__(self, world: World) -> None:
        super().__init__(world)
        s = world.settings
        self.abars = log_snr_levels(s.smc_K)
        self.levels = [world.joint.level(float(x)) for x in self.abars]
        rule = PosteriorSampling(world.joint, world.reward, world.strength)
        self.pulls = [rule.added(level, world.strength) for level in self.levels]
        self.moves = [posterior(a, b) for a, b in zip(self.levels[:-1], self.levels[1:], strict=True)]

    def log_twist(self, k: int, x: Tensor) -> Tensor:
        """Return log psi_k(x) up to what x does not change: its gradient is pull k; 0 at x = 0."""
        G, g = self.pulls[k]
        return (x * (0.5 * linear(G, x) + torch.tensor(g).to(x).view(-1, *[1] * (x.dim() - 1)))).sum(0)

    def constant(self, k: int) -> float:
        """Return log psi_k(0)."""
        level = self.levels[k]
        at_zero = (1 - level.abar) * (level.precision @ level.m)[0] / math.sqrt(level.abar)
        return self.world.strength * self.world.target.Q(float(at_zero))

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`: a block holds BLOCK / smc_particles independent runs."""
        s, like = self.world.settings, noise.like
        n, runs = s.smc_particles, BLOCK // s.smc_particles

        def normal() -> Tensor:
            return noise.normal(2).view(2, runs, n)

        first = starting_law(self.world.joint, float(self.abars[0]))
        x = linear(root(first.C), normal(), first.m)
        log_w = (self.log_twist(0, x) + self.constant(0)).double()
        log_z = torch.zeros(runs, dtype=torch.float64, device=like.device)
        resampled = torch.zeros(runs)
        for k, move in enumerate(self.moves):
            weight = torch.softmax(log_w, -1)
            share = 1 / (weight.square().sum(-1) * n)
            uniform = noise.uniform()[0, :runs]
            low = share < s.ess_threshold
            if bool(low.any()):
                resampled += low.cpu()
                kept = torch.stack([systematic(w, float(u)) for w, u in zip(weight, uniform, strict=True)])
                kept = torch.where(low[:, None], kept, torch.arange(n, device=kept.device))
                x = x.gather(2, kept.expand(2, runs, n))
                average = torch.logsumexp(log_w, -1) - math.log(n)
                log_z = torch.where(low, log_z + average, log_z)
                log_w = torch.where(low[:, None], torch.zeros_like(log_w), log_w)
            before = self.log_twist(k, x) + self.constant(k)
            G, g = self.pulls[k]
            half = root(move.D)
            drift = linear(half.T, linear(G, x, g))
            xi = normal()
            # x' = mean + D grad + root xi = mean + root (root' grad + xi)
            x = linear(move.A, x, move.b) + linear(half, drift + xi)
            after = self.log_twist(k + 1, x) + self.constant(k + 1)
            # log p - log proposal, both Gaussian with covariance D: |xi|^2 / 2 - |xi + root' grad|^2 / 2
            log_ratio = -(drift * (xi + 0.5 * drift)).sum(0)
            log_w = log_w + (log_ratio + after - before).double()
        log_z = log_z + torch.logsumexp(log_w, -1) - math.log(n)
        weight = torch.softmax(log_w, -1)
        kept = torch.stack([systematic(w, float(u)) for w, u in zip(weight, noise.uniform()[0], strict=False)])
        x = x.gather(2, kept.expand(2, runs, n)).reshape(2, BLOCK)
        extra = {
            "log_z": log_z.tolist(),
            "ess_fraction": (1 / (weight.square().sum(-1) * n)).tolist(),
            "resampled": resampled.tolist(),
        }
        return Draws(x[0], x[1], extra=extra)

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = len(self.moves)
        return Cost(prior=1, score=n + 1, value=n + 1, refresh=0)


PREDICTORS = [predictor(process, rule) for process in STEPS for rule in RULES]
