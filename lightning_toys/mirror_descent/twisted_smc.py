"""Twisted sequential Monte Carlo (Wu et al. 2023, arXiv 2306.17775)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent.affine import AffineStep, Array
from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample
from lightning_toys.mirror_descent.guidance import (
    DiffusionPosteriorSampling,
    TrainingFreeGuidance,
    TweedieGuidance,
    tweedie_action,
)
from lightning_toys.mirror_descent.joint import NoiseLevel
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise
from lightning_toys.mirror_descent.model import affine_map
from lightning_toys.mirror_descent.predictors import covariance_root
from lightning_toys.mirror_descent.problem import Cost, Problem
from lightning_toys.mirror_descent.reverse_process import log_snr_levels
from lightning_toys.mirror_descent.sampler import Draws, PairRecorder, Sampler
from lightning_toys.mirror_descent.samplers import systematic_resampling, z_check

TWISTS: dict[str, type[TweedieGuidance]] = {"dps": DiffusionPosteriorSampling, "tfg": TrainingFreeGuidance}


def reverse_kernel(noisy: NoiseLevel, cleaner: NoiseLevel) -> AffineStep:
    """Return the exact distribution of x at the cleaner level given x at the noisy one: A x + b + N(0, D).

    x_noisy = g x_cleaner + noise of variance 1 - g^2, g^2 = abar_noisy / abar_cleaner.
    """
    g = math.sqrt(noisy.abar / cleaner.abar)
    gain = g * cleaner.C @ noisy.precision
    return AffineStep(gain, cleaner.m - gain @ noisy.m, cleaner.C - g * gain @ cleaner.C)


class Proposal(NamedTuple):
    """Twist and untilted reverse kernel of the particles at a level.

    Attributes:
        log_twist: log psi (runs, n).
        gradient: of log psi (2, runs, n).
        mean: of the reverse kernel (2, runs, n).
        root: lower triangular root of the kernel's covariance, (2, 2) numbers or tensors (2, 2, runs, n).
    """

    log_twist: Tensor
    gradient: Tensor
    mean: Tensor
    root: Array | Tensor


def clamped_cholesky(H: Tensor, weight: float, scale: float) -> Tensor:
    """Return the Cholesky factor of scale (I + weight H) for H (2, 2, ...), of H's shape.

    Negative pivots, which come of errors in a learned H, are taken for 0.
    """
    C = scale * weight * H
    pivot = (scale + C[0, 0]).clamp_min(0.0)
    first = pivot.sqrt()
    low = torch.where(pivot > 0, C[1, 0] / first, torch.zeros_like(first))
    second = (scale + C[1, 1] - low.square()).clamp_min(0.0).sqrt()
    return torch.stack([torch.stack([first, torch.zeros_like(first)]), torch.stack([low, second])])


class TwistedSMC(Sampler):
    """Twisted sequential Monte Carlo (Wu et al. 2023): exact as the number of particles grows, and unbiased in Z.

    Proposals are the untilted exact reverse kernel p, its mean shifted by the gradient of the twist psi_k; weights are
    p psi' / (psi proposal). They are carried along, and the particles are resampled systematically when their effective
    sample size falls below ``ess_threshold`` of them. With a_0 = E[a_0 | x] the twist ``dps`` is exp(lambda Q(a_0)), as
    published; ``tfg`` smooths it as that rule does, which tames the weights' tails.

    ``extra`` has each run's ``log_z``, final ``ess_fraction`` and number of resamplings, ``resampled``.
    """

    name = "smc_twisted"
    family = "twisted SMC"
    num_traced = 0
    exact_in_the_limit = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        s = problem.settings
        self.abars = log_snr_levels(s.smc_K)
        self.levels = [problem.joint.level(float(x)) for x in self.abars]
        self.group = s.smc_particles
        self.guide: TweedieGuidance = TWISTS[s.smc_twist](problem.joint, problem.reward, problem.lambda_scale)
        self.twist_gradients = [self.guide.affine_term(level, problem.lambda_scale) for level in self.levels]
        self.kernels = [reverse_kernel(a, b) for a, b in zip(self.levels[:-1], self.levels[1:], strict=True)]

    def log_twist(self, k: int, x: Tensor) -> Tensor:
        """Return log psi_k(x) - log psi_k(0) (...) for x (2, ...), the integral of ``twist_gradients[k]``."""
        G, g = self.twist_gradients[k]
        return (x * (0.5 * affine_map(G, x) + torch.tensor(g).to(x).view(-1, *[1] * (x.dim() - 1)))).sum(0)

    def log_twist_at_zero(self, k: int) -> float:
        """Return log psi_k(0)."""
        level = self.levels[k]
        a0 = float((1 - level.abar) * (level.precision @ level.m)[0] / math.sqrt(level.abar))
        A, b = self.coefficients(k)
        return self.problem.lambda_scale * self.problem.target.Q.const + b * a0 - 0.5 * A * a0**2

    def coefficients(self, k: int) -> tuple[float, float]:
        """Return A and b of log psi_k = const + b a_0 - A a_0^2 / 2."""
        return self.guide.coefficients(self.levels[k], self.problem.lambda_scale)

    def proposal(self, k: int, x: Tensor) -> Proposal:
        """Return the twist of the particles x (2, runs, n) at level k, and where their proposals are."""
        last = k == len(self.kernels)
        if self.problem.model.exact:
            gradient = affine_map(self.twist_gradients[k][0], x, self.twist_gradients[k][1])
            log_twist = self.log_twist(k, x) + self.log_twist_at_zero(k)
            if last:
                return Proposal(log_twist, gradient, x, np.zeros((2, 2)))
            kernel = self.kernels[k]
            return Proposal(log_twist, gradient, affine_map(kernel.A, x, kernel.b), covariance_root(kernel.D))
        level, (A, b) = self.levels[k], self.coefficients(k)
        S, a0, a0_gradient, H = (
            v.reshape(*v.shape[:-1], *x.shape[1:]) for v in tweedie_action(self.problem.model, level, x.flatten(1))
        )
        const = self.problem.lambda_scale * self.problem.target.Q.const
        log_twist, gradient = const + b * a0 - 0.5 * A * a0.square(), a0_gradient * (b - A * a0)
        if last:
            return Proposal(log_twist, gradient, x, np.zeros((2, 2)))
        # x_noisy = g x_cleaner + N(0, 1 - g^2): mean and covariance of x_cleaner by Tweedie's formulas of both orders
        g2 = level.abar / self.levels[k + 1].abar
        mean = (x + (1 - g2) * S) / math.sqrt(g2)
        return Proposal(log_twist, gradient, mean, clamped_cholesky(H, 1 - g2, (1 - g2) / g2))

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`: a block holds BLOCK_SIZE / smc_particles independent runs."""
        s, like = self.problem.settings, noise.like
        n, runs_per_block = s.smc_particles, BLOCK_SIZE // s.smc_particles
        runs = noise.blocks * runs_per_block

        def normal() -> Tensor:
            return noise.normal(2).view(2, runs, n)

        pairs, half = PairRecorder(self.num_traced, noise.blocks), torch.full((runs,), 0.5, device=like.device)
        first = self.levels[0]
        x = affine_map(covariance_root(first.C), normal(), first.m)
        now = self.proposal(0, x)
        log_w = now.log_twist.double()
        log_z = torch.zeros(runs, dtype=torch.float64, device=like.device)
        resampled = torch.zeros(runs)
        for k in range(len(self.kernels)):
            weight = torch.softmax(log_w, -1)
            ess_fraction = 1 / (weight.square().sum(-1) * n)
            uniform = noise.uniforms_of_groups(runs_per_block)
            low = ess_fraction < s.ess_threshold
            if bool(low.any()):
                resampled += low.cpu()
                kept = systematic_resampling(weight, uniform)
                kept = torch.where(low[:, None], kept, torch.arange(n, device=kept.device))
                x = x.gather(2, kept.expand(2, runs, n))
                now = self.proposal(k, x)
                log_mean_w = torch.logsumexp(log_w, -1) - math.log(n)
                log_z = torch.where(low, log_z + log_mean_w, log_z)
                log_w = torch.where(low[:, None], torch.zeros_like(log_w), log_w)
            root, grad = now.root, now.gradient
            shift = torch.stack([root[0, 0] * grad[0] + root[1, 0] * grad[1], root[1, 1] * grad[1]])
            xi = normal()
            # x' = mean + D grad + root xi = mean + root (root' grad + xi)
            v = shift + xi
            x = now.mean + torch.stack([root[0, 0] * v[0], root[1, 0] * v[0] + root[1, 1] * v[1]])
            previous_log_twist, now = now.log_twist, self.proposal(k + 1, x)
            # log p - log proposal, both Gaussian with covariance D: |xi|^2 / 2 - |xi + root' grad|^2 / 2
            log_ratio = -(shift * (xi + 0.5 * shift)).sum(0)
            log_w = log_w + (log_ratio + now.log_twist - previous_log_twist).double()
            if self.num_traced:
                seen = systematic_resampling(torch.softmax(log_w, -1), half)
                origin = (math.sqrt(self.abars[k + 1]) - 1) * self.problem.origin
                shown = x.gather(2, seen.expand(2, runs, n)).flatten(1)
                pairs.record(shown[0] + float(origin[0]), shown[1] + float(origin[1]))
        log_z = log_z + torch.logsumexp(log_w, -1) - math.log(n)
        weight = torch.softmax(log_w, -1)
        kept = systematic_resampling(weight, noise.uniforms_of_groups(runs_per_block))
        x = x.gather(2, kept.expand(2, runs, n)).flatten(1)
        extra = {
            "log_z": log_z.tolist(),
            "ess_fraction": (1 / (weight.square().sum(-1) * n)).tolist(),
            "resampled": resampled.tolist(),
        }
        return Draws(x[0], x[1], *pairs.traces(), extra=extra)

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = len(self.kernels)
        return Cost(prior=1, score=n + 1, value=n + 1, refresh=0)

    def own_checks(self, samples: Sequence[Sample]) -> list[ClosedFormCheck]:
        """See :meth:`Sampler.own_checks`: Z."""
        return [z_check(self, samples)]
