"""Twisted sequential Monte Carlo (Wu et al. 2023, arXiv 2306.17775)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent.affine import Array, covariance_root, reverse_kernel
from lightning_toys.mirror_descent.batched_cholesky import clamped_cholesky, lower_times, lower_transposed_times
from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample
from lightning_toys.mirror_descent.guidance import (
    DiffusionPosteriorSampling,
    TrainingFreeGuidance,
    TweedieGuidance,
    chain_rule,
    tweedie_action,
)
from lightning_toys.mirror_descent.joint_distribution import without_rows
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise
from lightning_toys.mirror_descent.model import affine_map
from lightning_toys.mirror_descent.problem import Cost, Problem
from lightning_toys.mirror_descent.resampling import Resampling, Systematic
from lightning_toys.mirror_descent.reverse_process import log_snr_levels
from lightning_toys.mirror_descent.sampler import Draws, PairRecorder, Sampler
from lightning_toys.mirror_descent.samplers import z_check

TWISTS: dict[str, type[TweedieGuidance]] = {"dps": DiffusionPosteriorSampling, "tfg": TrainingFreeGuidance}


class Proposal(NamedTuple):
    """Twist and untilted reverse kernel of the particles at a level.

    Attributes:
        log_twist: log psi (runs, n).
        gradient: of log psi (D, runs, n).
        mean: of the reverse kernel (D, runs, n).
        root: lower triangular root of the kernel's covariance, (D, D) numbers or tensors (D, D, runs, n).
        log_q: log density of the level (runs, n), where it is known with its constant.
    """

    log_twist: Tensor
    gradient: Tensor
    mean: Tensor
    root: Array | Tensor
    log_q: Tensor | None = None


class TwistedSMC(Sampler):
    """Twisted sequential Monte Carlo (Wu et al. 2023): exact as the number of particles grows, and unbiased in Z.

    Proposals are the untilted exact reverse kernel p, its mean shifted by the gradient of the twist psi_k; weights are
    p psi' / (psi proposal). They are carried along, and the particles are resampled when their effective sample size
    falls below ``ess_threshold`` of them. With a_0 = E[a_0 | x] the twist ``dps`` is exp(lambda Q(a_0)), as published;
    ``tfg`` smooths it as that rule does, which tames the weights' tails.

    In other problems the proposal's kernel is the Gaussian with p's first two moments (Tweedie's formulas), and the
    weight's p is exact all the same, by Bayes' rule from the densities of two levels.

    ``extra`` has each run's ``log_z``, final ``ess_fraction`` and number of resamplings, ``resampled``.

    Args:
        problem: the sampling problem.
        resampling: the scheme's class.
    """

    name = "smc_twisted"
    family = "twisted SMC"
    whole_groups = True
    num_traced = 0
    exact_in_the_limit = True

    def __init__(self, problem: Problem, resampling: Callable[[], Resampling] = Systematic) -> None:
        super().__init__(problem)
        s = problem.settings
        self.resampling = resampling()
        if resampling is not Systematic:
            self.name = f"smc_twisted_{type(self.resampling).__name__.lower()}"
        self.abars = log_snr_levels(s.smc_K)
        self.levels = [problem.joint.level(float(x)) for x in self.abars]
        self.group = s.smc_particles
        self.guide: TweedieGuidance = TWISTS[s.smc_twist](problem.joint, problem.reward, problem.lambda_scale)
        self.twists = [self.guide.twist(level, problem.lambda_scale) for level in self.levels]
        self.steps = len(self.levels) - 1
        if problem.model.exact:
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
        return float(self.twists[k].value(torch.tensor([a0], dtype=torch.float64)))

    def proposal(self, k: int, x: Tensor) -> Proposal:
        """Return the twist of the particles x (D, runs, n) at level k, and where their proposals are."""
        last = k == self.steps
        if self.problem.model.exact:
            gradient = affine_map(self.twist_gradients[k][0], x, self.twist_gradients[k][1])
            log_twist = self.log_twist(k, x) + self.log_twist_at_zero(k)
            if last:
                return Proposal(log_twist, gradient, x, np.zeros((2, 2)))
            kernel = self.kernels[k]
            return Proposal(log_twist, gradient, affine_map(kernel.A, x, kernel.b), covariance_root(kernel.D))
        return self.tweedie_proposal(k, x, last)

    def tweedie_proposal(self, k: int, x: Tensor, last: bool) -> Proposal:
        """Return :meth:`proposal` from the model's score and Jacobian, in any problem."""
        level, model, twist = self.levels[k], self.problem.model, self.twists[k]
        flat = x.flatten(1)
        S, a0, J, H = (
            v.reshape(*v.shape[:-1], *x.shape[1:])
            for v in tweedie_action(model, level, flat, self.problem.joint.action_dim)
        )
        log_q = model.log_density(level, flat.double()).view(x.shape[1:]) if model.normalised else None
        log_twist, gradient = twist.value(a0), chain_rule(J, twist.gradient(a0))
        if last:
            return Proposal(log_twist, gradient, x, np.zeros((len(x), len(x))), log_q)
        # x_noisy = g x_cleaner + N(0, 1 - g^2): mean and covariance of x_cleaner by Tweedie's formulas of both orders
        g2 = level.abar / self.levels[k + 1].abar
        mean = (x + (1 - g2) * S) / math.sqrt(g2)
        return Proposal(log_twist, gradient, mean, clamped_cholesky(H, 1 - g2, (1 - g2) / g2), log_q)

    def exact_kernel_ratio(self, k: int, before: Tensor, old: Proposal, after: Tensor, new: Proposal) -> Tensor:
        """Return log p(after | before) less log of the Gaussian kernel's root's density at 0 (runs, n), in double.

        p(x' | x) = q'(x') N(x; g x', 1 - g^2) / q(x), g^2 = abar / abar', D log(2 pi) / 2 on both sides left out.
        """
        assert old.log_q is not None
        assert new.log_q is not None
        g2 = self.levels[k].abar / self.levels[k + 1].abar
        left = before.double() - math.sqrt(g2) * after.double()
        log_noise = -0.5 * left.square().sum(0) / (1 - g2) - 0.5 * len(left) * math.log(1 - g2)
        log_root = sum(torch.log(torch.as_tensor(old.root[i, i]).double()) for i in range(len(left)))
        out: Tensor = new.log_q + log_noise - old.log_q + log_root
        return out

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`: a block holds BLOCK_SIZE / smc_particles independent runs."""
        s, like, joint = self.problem.settings, noise.like, self.problem.joint
        n, runs_per_block = s.smc_particles, BLOCK_SIZE // s.smc_particles
        runs, dim = noise.blocks * runs_per_block, joint.dim
        pairs, half = PairRecorder(self.num_traced, noise.blocks), torch.full((runs,), 0.5, device=like.device)
        x = self.problem.model.draw(noise, self.levels[0]).view(dim, runs, n)
        now = self.proposal(0, x)
        log_w = now.log_twist.double()
        log_z = torch.zeros(runs, dtype=torch.float64, device=like.device)
        resampled = torch.zeros(runs)
        for k in range(self.steps):
            weight = torch.softmax(log_w, -1)
            ess_fraction = 1 / (weight.square().sum(-1) * n)
            uniform = self.resampling.uniforms(noise, runs, n)
            low = ess_fraction < s.ess_threshold
            if bool(low.any()):
                resampled += low.cpu()
                kept = self.resampling.indices(weight, uniform)
                kept = torch.where(low[:, None], kept, torch.arange(n, device=kept.device))
                x = x.gather(2, kept.expand(dim, runs, n))
                now = self.proposal(k, x)
                log_mean_w = torch.logsumexp(log_w, -1) - math.log(n)
                log_z = torch.where(low, log_z + log_mean_w, log_z)
                log_w = torch.where(low[:, None], torch.zeros_like(log_w), log_w)
            shift = lower_transposed_times(now.root, now.gradient)
            xi = noise.normal(dim).view(dim, runs, n)
            # x' = mean + D grad + root xi = mean + root (root' grad + xi)
            before, old = x, now
            x = now.mean + lower_times(now.root, shift + xi)
            now = self.proposal(k + 1, x)
            if now.log_q is not None:
                # log p - log proposal, the proposal being Gaussian
                log_ratio = self.exact_kernel_ratio(k, before, old, x, now) + 0.5 * xi.double().square().sum(0)
            else:
                # both are Gaussian with covariance D: |xi|^2 / 2 - |xi + root' grad|^2 / 2
                log_ratio = -(shift * (xi + 0.5 * shift)).sum(0)
            log_w = log_w + (log_ratio + now.log_twist - old.log_twist).double()
            if self.num_traced:
                seen = systematic_half(log_w, half)
                origin = (math.sqrt(self.abars[k + 1]) - 1) * self.problem.origin
                shown = x.gather(2, seen.expand(dim, runs, n)).flatten(1)
                d = joint.action_dim
                pairs.record(shown[0] + float(origin[0]), shown[d] + float(origin[d]))
        log_z = log_z + torch.logsumexp(log_w, -1) - math.log(n)
        weight = torch.softmax(log_w, -1)
        kept = self.resampling.indices(weight, self.resampling.uniforms(noise, runs, n))
        x = x.gather(2, kept.expand(dim, runs, n)).flatten(1)
        extra = {
            "log_z": log_z.tolist(),
            "ess_fraction": (1 / (weight.square().sum(-1) * n)).tolist(),
            "resampled": resampled.tolist(),
        }
        a, state = x[: joint.action_dim], x[joint.action_dim :]
        return Draws(without_rows(a), without_rows(state), *pairs.traces(), extra=extra)

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        return Cost(prior=1, score=self.steps + 1, value=self.steps + 1, refresh=0)

    def own_checks(self, samples: Sequence[Sample]) -> list[ClosedFormCheck]:
        """See :meth:`Sampler.own_checks`: Z."""
        return [z_check(self, samples)]


def systematic_half(log_w: Tensor, half: Tensor) -> Tensor:
    """Return the indices (runs, n) that systematic resampling keeps at the quantiles in the middle, for animations."""
    return Systematic().indices(torch.softmax(log_w, -1), half)
