"""Predictor samplers: a reverse process, SDE or ODE, with a guidance rule; named ``sde_poe``, ``ode_dps``, ..."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent.affine import AffineStep, Array, propagate
from lightning_toys.mirror_descent.guidance import GuidanceRule, ProductOfExperts
from lightning_toys.mirror_descent.joint import Gaussian, Joint
from lightning_toys.mirror_descent.kernels import Noise
from lightning_toys.mirror_descent.model import affine_map
from lightning_toys.mirror_descent.problem import Cost, Problem
from lightning_toys.mirror_descent.reverse_process import STEP_RULES, guided_steps, log_snr_levels
from lightning_toys.mirror_descent.sampler import Draws, PairRecorder, Sampler
from lightning_toys.mirror_descent.tilt import Reward


def covariance_root(C: Array) -> Array:
    """Return L (2, 2) with L L' = C: the Cholesky factor, or where the diagonal has zeros the root of the diagonal."""
    L: Array = (np.linalg.cholesky(C) if np.all(np.diag(C) > 0) else np.sqrt(np.diag(np.diag(C)))).astype(np.float64)
    return L


class Predictor(Sampler):
    """A guided reverse process from the joint's noisiest level. With the exact score its distribution is Gaussian.

    Args:
        problem: the sampling problem.
        process: ``sde``, the reverse SDE by exponential Euler-Maruyama, or ``ode``, the probability-flow ODE by DDIM.
        rule: the guidance rule's class.
    """

    num_traced = 0

    def __init__(
        self,
        problem: Problem,
        process: Literal["sde", "ode"] = "sde",
        rule: Callable[[Joint, Reward, float], GuidanceRule] = ProductOfExperts,
    ) -> None:
        super().__init__(problem)
        self.abars = log_snr_levels(problem.settings.predictor_K)
        self.first = problem.joint.level(float(self.abars[0]))
        self.guide, self.process = rule(problem.joint, problem.reward, problem.lambda_scale), process
        self.name, self.family = f"{process}_{self.guide.name}", f"reverse {process.upper()}"

    def beta(self, abar: float) -> float:
        """Return the schedule's beta, with this process's noisiest level as abar_min."""
        return self.problem.lambda_scale * self.problem.schedule.fraction(abar, float(self.abars[0]))

    @cached_property
    def steps(self) -> list[AffineStep]:
        """Every step with the exact score."""
        return guided_steps(self.problem.joint, self.guide, self.beta, self.abars.tolist(), STEP_RULES[self.process])

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        x = affine_map(covariance_root(self.first.C), noise.normal(2), self.first.m)
        exact, pairs = self.problem.model.exact, PairRecorder(self.num_traced, noise.blocks)
        for k in range(len(self.abars) - 1):
            x, variance = self.exact_step(k, x) if exact else self.model_step(k, x)
            if variance > 0:
                x.add_(noise.normal(2), alpha=math.sqrt(variance))
            # a level's origin is sqrt(abar) of the clean one, which is added to all that is recorded
            offset = (math.sqrt(self.abars[k + 1]) - 1) * self.problem.origin
            pairs.record(x[0] + float(offset[0]), x[1] + float(offset[1]))
        return Draws(x[0], x[1], *pairs.traces())

    def exact_step(self, k: int, x: Tensor) -> tuple[Tensor, float]:
        """Return the mean of step k from x (2, B) with the exact score, and the variance of its noise."""
        step = self.steps[k]
        return affine_map(step.A, x, step.b), float(step.D[0, 0])

    def model_step(self, k: int, x: Tensor) -> tuple[Tensor, float]:
        """Return the same as :meth:`exact_step` with the model's score, exact or learned."""
        abar, next_abar = float(self.abars[k]), float(self.abars[k + 1])
        step = STEP_RULES[self.process](abar, next_abar)
        S = self.guide.guided_score(self.problem.model, self.problem.joint.level(abar), self.beta(abar), x)
        return torch.add(step.x_scale * x, S, alpha=step.score_scale), step.variance

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = len(self.abars) - 1
        return Cost(prior=1, score=n, value=n if self.guide.evaluates_reward else 0, refresh=0)

    def exact_distribution(self) -> Gaussian:
        """See :meth:`Sampler.exact_distribution`."""
        x: Gaussian = self.first
        for step in self.steps:
            x = propagate(x, step)
        return x
