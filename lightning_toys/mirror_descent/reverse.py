"""Samplers that run the reverse process: SDE and ODE with each guidance rule, and twisted sequential Monte Carlo."""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent.affine import Affine, Array, Law
from lightning_toys.mirror_descent.guidance import RULES, ThroughTweedie, tweedie_of
from lightning_toys.mirror_descent.joint import Level
from lightning_toys.mirror_descent.kernels import BLOCK, Noise
from lightning_toys.mirror_descent.model import linear
from lightning_toys.mirror_descent.predictors import STEPS, log_snr_levels, plan
from lightning_toys.mirror_descent.predictors import start as starting_law
from lightning_toys.mirror_descent.problem import Cost, World
from lightning_toys.mirror_descent.samplers import Draws, Sampler, systematic


def root(C: Array) -> Array:
    """Return a square root of a covariance that may have zeros on its diagonal."""
    half: Array = (np.linalg.cholesky(C) if np.all(np.diag(C) > 0) else np.sqrt(np.diag(np.diag(C)))).astype(np.float64)
    return half


class Predictor(Sampler):
    """A guided reverse process. Its law is Gaussian, and known."""

    process: str
    rule: str

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.abars = log_snr_levels(world.settings.predictor_K)
        self.first = starting_law(world.joint, float(self.abars[0]))
        self.guide = RULES[self.rule](world.joint, world.reward, world.strength)

    def beta(self, abar: float) -> float:
        """Return the schedule's strength: its r runs over the process's own levels."""
        return self.world.strength * self.world.schedule.share(abar, float(self.abars[0]))

    @cached_property
    def steps(self) -> list[Affine]:
        """Every step with the exact score."""
        return plan(self.world.joint, self.guide, self.beta, self.abars.tolist(), STEPS[self.process])

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        x = linear(root(self.first.C), noise.normal(2), self.first.m)
        exact = self.world.model.exact
        for k in range(len(self.abars) - 1):
            x, variance = self.affine(k, x) if exact else self.learned(k, x)
            if variance > 0:
                x.add_(noise.normal(2), alpha=math.sqrt(variance))
        return Draws(x[0], x[1])

    def affine(self, k: int, x: Tensor) -> tuple[Tensor, float]:
        """Return a step's mean with the exact score, and the variance of its noise."""
        step = self.steps[k]
        return linear(step.A, x, step.b), float(step.D[0, 0])

    def learned(self, k: int, x: Tensor) -> tuple[Tensor, float]:
        """Return the same with the model's score, whatever it is."""
        abar, to = float(self.abars[k]), float(self.abars[k + 1])
        move = STEPS[self.process](abar, to)
        S = self.guide.guided(self.world.model, self.world.joint.level(abar), self.beta(abar), x)
        return torch.add(move.keep * x, S, alpha=move.pull), move.variance

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = len(self.abars) - 1
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


class Look(NamedTuple):
    """What particles see at a level: log psi (runs, n), its gradient (2, runs, n), and where the untilted law's reverse
    kernel takes them: its mean (2, runs, n) and the lower triangular root of its covariance, of numbers or of tensors.
    """

    log_twist: Tensor
    pull: Tensor
    mean: Tensor
    half: Array | Tensor


def cholesky(H: Tensor, weight: float, scale: float) -> Tensor:
    """Return the lower triangular root of scale (I + weight H) for H (2, 2, ...); negative pivots, of errors, are 0."""
    C = scale * weight * H
    pivot = (scale + C[0, 0]).clamp_min(0.0)
    first = pivot.sqrt()
    low = torch.where(pivot > 0, C[1, 0] / first, torch.zeros_like(first))
    second = (scale + C[1, 1] - low.square()).clamp_min(0.0).sqrt()
    return torch.stack([torch.stack([first, torch.zeros_like(first)]), torch.stack([low, second])])


class TwistedSMC(Sampler):
    """Twisted sequential Monte Carlo (Wu et al. 2023): exact as the number of particles grows, and unbiased in Z.

    Particles follow the untilted law's exact reverse kernel p, drawn towards the reward by the gradient of the twist
    psi_k, and weighed by p psi' / (psi proposal). Weights are carried, and the particles are resampled systematically
    when their effective share falls below ``ess_threshold``. With a_0 = E[a_0 | x] the twist ``dps`` is
    exp(lambda Q(a_0)), as published; ``tfg`` smooths it as that rule does, which tames the weights' tails.
    """

    name = "smc_twisted"
    independent = False

    def __init__(self, world: World) -> None:
        super().__init__(world)
        s = world.settings
        self.abars = log_snr_levels(s.smc_K)
        self.levels = [world.joint.level(float(x)) for x in self.abars]
        self.guide = RULES[s.smc_twist](world.joint, world.reward, world.strength)
        self.pulls = [self.guide.added(level, world.strength) for level in self.levels]
        self.moves = [posterior(a, b) for a, b in zip(self.levels[:-1], self.levels[1:], strict=True)]

    def log_twist(self, k: int, x: Tensor) -> Tensor:
        """Return log psi_k(x) up to what x does not change: its gradient is pull k; 0 at x = 0."""
        G, g = self.pulls[k]
        return (x * (0.5 * linear(G, x) + torch.tensor(g).to(x).view(-1, *[1] * (x.dim() - 1)))).sum(0)

    def constant(self, k: int) -> float:
        """Return log psi_k(0)."""
        level = self.levels[k]
        at_zero = float((1 - level.abar) * (level.precision @ level.m)[0] / math.sqrt(level.abar))
        A, b = self.coefficients(k)
        return self.world.strength * self.world.target.Q.const + b * at_zero - 0.5 * A * at_zero**2

    def coefficients(self, k: int) -> tuple[float, float]:
        """Return A and b of log psi_k = const + b a_0 - A a_0^2 / 2."""
        assert isinstance(self.guide, ThroughTweedie)
        return self.guide.coefficients(self.levels[k], self.world.strength)

    def look(self, k: int, x: Tensor) -> Look:
        """Return what the particles x (2, runs, n) see at level k."""
        if self.world.model.exact:
            pull = linear(self.pulls[k][0], x, self.pulls[k][1])
            if k == len(self.moves):
                return Look(self.log_twist(k, x) + self.constant(k), pull, x, np.zeros((2, 2)))
            move = self.moves[k]
            return Look(self.log_twist(k, x) + self.constant(k), pull, linear(move.A, x, move.b), root(move.D))
        level, (A, b) = self.levels[k], self.coefficients(k)
        S, a0, row, H = (
            v.reshape(*v.shape[:-1], *x.shape[1:]) for v in tweedie_of(self.world.model, level, x.flatten(1))
        )
        const = self.world.strength * self.world.target.Q.const
        twist, pull = const + b * a0 - 0.5 * A * a0.square(), row * (b - A * a0)
        if k == len(self.moves):
            return Look(twist, pull, x, np.zeros((2, 2)))
        # x_low = g x_high + N(0, 1 - g^2): mean and covariance of x_high by Tweedie's formulas of both orders
        g2 = level.abar / self.levels[k + 1].abar
        mean = (x + (1 - g2) * S) / math.sqrt(g2)
        return Look(twist, pull, mean, cholesky(H, 1 - g2, (1 - g2) / g2))

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`: a block holds BLOCK / smc_particles independent runs."""
        s, like = self.world.settings, noise.like
        n, of_block = s.smc_particles, BLOCK // s.smc_particles
        runs = noise.blocks * of_block

        def normal() -> Tensor:
            return noise.normal(2).view(2, runs, n)

        first = starting_law(self.world.joint, float(self.abars[0]))
        x = linear(root(first.C), normal(), first.m)
        seen = self.look(0, x)
        log_w = seen.log_twist.double()
        log_z = torch.zeros(runs, dtype=torch.float64, device=like.device)
        resampled = torch.zeros(runs)
        for k in range(len(self.moves)):
            weight = torch.softmax(log_w, -1)
            share = 1 / (weight.square().sum(-1) * n)
            uniform = noise.uniforms_of_groups(of_block)
            low = share < s.ess_threshold
            if bool(low.any()):
                resampled += low.cpu()
                kept = systematic(weight, uniform)
                kept = torch.where(low[:, None], kept, torch.arange(n, device=kept.device))
                x = x.gather(2, kept.expand(2, runs, n))
                seen = self.look(k, x)
                average = torch.logsumexp(log_w, -1) - math.log(n)
                log_z = torch.where(low, log_z + average, log_z)
                log_w = torch.where(low[:, None], torch.zeros_like(log_w), log_w)
            half = seen.half
            drift = torch.stack([half[0, 0] * seen.pull[0] + half[1, 0] * seen.pull[1], half[1, 1] * seen.pull[1]])
            xi = normal()
            # x' = mean + D grad + root xi = mean + root (root' grad + xi)
            v = drift + xi
            x = seen.mean + torch.stack([half[0, 0] * v[0], half[1, 0] * v[0] + half[1, 1] * v[1]])
            before, seen = seen.log_twist, self.look(k + 1, x)
            # log p - log proposal, both Gaussian with covariance D: |xi|^2 / 2 - |xi + root' grad|^2 / 2
            log_ratio = -(drift * (xi + 0.5 * drift)).sum(0)
            log_w = log_w + (log_ratio + seen.log_twist - before).double()
        log_z = log_z + torch.logsumexp(log_w, -1) - math.log(n)
        weight = torch.softmax(log_w, -1)
        kept = systematic(weight, noise.uniforms_of_groups(of_block))
        x = x.gather(2, kept.expand(2, runs, n)).flatten(1)
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
