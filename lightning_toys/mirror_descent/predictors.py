"""Predictor samplers: a reverse process, SDE or ODE, with each guidance rule; named ``sde_poe``, ``ode_dps``, ..."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lightning_toys.mirror_descent.affine import AffineStep, Array, propagate
from lightning_toys.mirror_descent.guidance import GUIDANCE_RULES
from lightning_toys.mirror_descent.joint import Gaussian
from lightning_toys.mirror_descent.kernels import Noise
from lightning_toys.mirror_descent.model import affine_map
from lightning_toys.mirror_descent.problem import Cost, Problem
from lightning_toys.mirror_descent.reverse_process import STEP_RULES, guided_steps, log_snr_levels
from lightning_toys.mirror_descent.samplers import Draws, Sampler


def covariance_root(C: Array) -> Array:
    """Return L (2, 2) with L L' = C: the Cholesky factor, or where the diagonal has zeros the root of the diagonal."""
    L: Array = (np.linalg.cholesky(C) if np.all(np.diag(C) > 0) else np.sqrt(np.diag(np.diag(C)))).astype(np.float64)
    return L


class Predictor(Sampler):
    """A guided reverse process from the joint's noisiest level. With the exact score its distribution is Gaussian."""

    process: str
    rule: str

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.abars = log_snr_levels(problem.settings.predictor_K)
        self.first = problem.joint.level(float(self.abars[0]))
        self.guide = GUIDANCE_RULES[self.rule](problem.joint, problem.reward, problem.lambda_scale)

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
        exact = self.problem.model.exact
        for k in range(len(self.abars) - 1):
            x, variance = self.exact_step(k, x) if exact else self.model_step(k, x)
            if variance > 0:
                x.add_(noise.normal(2), alpha=math.sqrt(variance))
        return Draws(x[0], x[1])

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
        return Cost(prior=1, score=n, value=0 if self.rule == "none" else n, refresh=0)

    def exact_distribution(self) -> Gaussian:
        """See :meth:`Sampler.exact_distribution`."""
        x: Gaussian = self.first
        for step in self.steps:
            x = propagate(x, step)
        return x


def make_predictor(process: str, rule: str) -> type[Predictor]:
    """Return the sampler class of a process and a guidance rule."""
    name = f"{process}_{rule}"
    return type(name, (Predictor,), {"name": name, "process": process, "rule": rule, "__doc__": Predictor.__doc__})


PREDICTORS = [make_predictor(process, rule) for process in STEP_RULES for rule in GUIDANCE_RULES]
