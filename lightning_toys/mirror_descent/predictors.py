"""Predictor samplers: a reverse process, SDE or ODE, with a guidance rule; named ``sde_poe``, ``ode_dps``, ..."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import LARGEST, REPEATS, bounded, check_settings, require
from lightning_toys.mirror_descent.affine import AffineStep, propagate
from lightning_toys.mirror_descent.guidance import GuidanceRule, ProductOfExperts
from lightning_toys.mirror_descent.joint import Gaussian
from lightning_toys.mirror_descent.joint_distribution import without_rows
from lightning_toys.mirror_descent.kernels import Noise, ula
from lightning_toys.mirror_descent.model import affine_map
from lightning_toys.mirror_descent.problem import Cost, Problem
from lightning_toys.mirror_descent.reverse_process import (
    STEP_RULES,
    ReverseStep,
    ddim_step,
    guided_steps,
    log_snr_levels,
)
from lightning_toys.mirror_descent.sampler import Draws, PairRecorder, Sampler
from lightning_toys.mirror_descent.tilt import Reward


class Predictor(Sampler):
    """A guided reverse process from the joint's noisiest level.

    In the linear-Gaussian problem with the exact score and an affine rule its distribution is Gaussian, and so known.

    Args:
        problem: the sampling problem.
        process: ``sde``, the reverse SDE by exponential Euler-Maruyama, ``ode``, the probability-flow ODE by DDIM, or
            ``ddim`` with noise, see ``eta``.
        rule: the guidance rule's class.
        eta: of ``ddim``, in [0, 1]: 0 is the ``ode``, 1 is DDPM's ancestral kernel (Song et al. 2021, arXiv 2010.02502,
            equation 16; Ho et al. 2020, arXiv 2006.11239).
        scale: the guidance scale, a factor of the schedule's tilt; 1 for rules that do not use it.
        recurrence: how often each step is taken, x noised back to the step's level in between (TFG's N_recur, Ye et al.
            2024, arXiv 2409.15761; RePaint's resampling).
        corrector_steps: Langevin steps on the guided score after each step, at the level that it ends at (predictor and
            corrector, Song et al. 2021, arXiv 2011.13456).
        corrector_size: their step size in units of the level's noise variance, 1 - abar.

    Raises:
        ToyError: a setting is out of bounds or has no effect, or the rule gives neither of its two methods for this
            problem.
    """

    num_traced = 0

    def __init__(
        self,
        problem: Problem,
        process: Literal["sde", "ode", "ddim"] = "sde",
        rule: Callable[[Any, Reward, float], GuidanceRule] = ProductOfExperts,
        eta: float = 1.0,
        scale: float = 1.0,
        recurrence: int = 1,
        corrector_steps: int = 0,
        corrector_size: float = 0.1,
    ) -> None:
        check_settings(Predictor, locals(), "--model.samplers: Predictor's ")
        super().__init__(problem)
        flag = "--model.samplers: Predictor's"
        bounded(f"{flag} eta", eta, 0.0, 1.0)
        bounded(f"{flag} scale", scale, -LARGEST)
        bounded(f"{flag} recurrence", recurrence, 1, REPEATS)
        bounded(f"{flag} corrector_steps", corrector_steps, 0, REPEATS)
        bounded(f"{flag} corrector_size", corrector_size, 0.0, 10.0, above=True)
        self.eta, self.scale, self.recurrence = eta, scale, recurrence
        self.corrector_steps, self.corrector_size = corrector_steps, corrector_size
        self.abars = log_snr_levels(problem.settings.predictor_K)
        self.first = problem.joint.level(float(self.abars[0]))
        self.guide, self.process = rule(problem.joint, problem.reward, problem.lambda_scale), process
        self.name, self.family = f"{process}_{self.guide.name}", f"reverse {process.upper()}"
        if process == "ddim":
            self.name, self.family = f"ddim{eta:g}_{self.guide.name}", "reverse DDIM, eta > 0"
        self.name += f"_x{scale:g}" * (scale != 1) + f"_recur{recurrence}" * (recurrence > 1)
        self.name += f"_pc{corrector_steps}" * (corrector_steps > 0)
        require(
            scale == 1 or self.guide.uses_beta,
            f"{flag} scale: {scale:g} is not allowed with the rule {self.guide.name}, which it does not change; give 1",
        )
        # coefficients of the Gaussians may be used
        self.affine = problem.model.exact and self.guide.is_affine
        require(
            self.affine or self.guide.is_general or (self.guide.is_affine and problem.model.linear),
            f"--model.samplers: the rule {self.guide.name} is not allowed here, it has affine_term alone, of "
            "the linear-Gaussian problem; give it guided_score(model, level, beta, x)",
        )

    def beta(self, abar: float) -> float:
        """Return the schedule's beta, with this process's noisiest level as abar_min."""
        return self.scale * (self.problem.lambda_scale * self.problem.schedule.fraction(abar, float(self.abars[0])))

    def step_rule(self, abar: float, next_abar: float) -> ReverseStep:
        """Return the process's step from one level to the next."""
        if self.process == "ddim":
            return ddim_step(abar, next_abar, self.eta)
        return STEP_RULES[self.process](abar, next_abar)

    @cached_property
    def steps(self) -> list[AffineStep]:
        """Every step with the exact score, of an affine rule in the linear-Gaussian problem."""
        return guided_steps(self.problem.linear_joint, self.guide, self.beta, self.abars.tolist(), self.step_rule)

    def draw(self, noise: Noise) -> Draws:
        """See :meth:`Sampler.draw`."""
        x, d = self.problem.model.draw(noise, self.first), self.problem.joint.action_dim
        pairs = PairRecorder(self.num_traced, noise.blocks)
        for k in range(len(self.abars) - 1):
            for again in reversed(range(self.recurrence)):
                x, variance = self.exact_step(k, x) if self.affine else self.model_step(k, x)
                if variance > 0:
                    x.add_(noise.normal(len(x)), alpha=math.sqrt(variance))
                if again:
                    g = self.shrinkage(k)
                    x = torch.add(g * x, noise.normal(len(x)), alpha=math.sqrt(1 - g * g))
            for _ in range(self.correctors_at(k)):
                abar = float(self.abars[k + 1])
                S = self.guide.guided_score(self.problem.model, self.problem.joint.level(abar), self.beta(abar), x)
                x = ula(noise, x, S, self.corrector_size * (1 - abar))
            # a level's origin is sqrt(abar) of the clean one, which is added to all that is recorded
            offset = (math.sqrt(self.abars[k + 1]) - 1) * self.problem.origin
            pairs.record(x[0] + float(offset[0]), x[d] + float(offset[d]))
        return Draws(without_rows(x[:d]), without_rows(x[d:]), *pairs.traces())

    def shrinkage(self, k: int) -> float:
        """Return g of noising back from level k + 1 to k: g x + N(0, 1 - g^2)."""
        return math.sqrt(self.abars[k] / self.abars[k + 1])

    def correctors_at(self, k: int) -> int:
        """Return the corrector steps after step k: none at the clean level, whose score has no noise to scale them."""
        return self.corrector_steps if self.abars[k + 1] < 1 else 0

    def exact_step(self, k: int, x: Tensor) -> tuple[Tensor, float]:
        """Return the mean of step k from x (2, B) with the exact score, and the variance of its noise."""
        step = self.steps[k]
        return affine_map(step.A, x, step.b), float(step.D[0, 0])

    def model_step(self, k: int, x: Tensor) -> tuple[Tensor, float]:
        """Return the same as :meth:`exact_step` with the model's score, in any problem: x (D, B)."""
        abar, next_abar = float(self.abars[k]), float(self.abars[k + 1])
        step = self.step_rule(abar, next_abar)
        S = self.guide.guided_score(self.problem.model, self.problem.joint.level(abar), self.beta(abar), x)
        return torch.add(step.x_scale * x, S, alpha=step.score_scale), step.variance

    def cost(self) -> Cost:
        """See :meth:`Sampler.cost`."""
        n = len(self.abars) - 1
        scores = n * self.recurrence + (n - 1) * self.corrector_steps
        return Cost(prior=1, score=scores, value=scores if self.guide.evaluates_reward else 0, refresh=0)

    def exact_distribution(self) -> Gaussian | None:
        """See :meth:`Sampler.exact_distribution`."""
        if not self.affine:
            return None
        x: Gaussian = self.first
        for k, step in enumerate(self.steps):
            g = self.shrinkage(k)
            back = AffineStep(g * np.eye(2), np.zeros(2), (1 - g * g) * np.eye(2))
            for _ in range(self.recurrence - 1):
                x = propagate(propagate(x, step), back)
            x = propagate(x, step)
            if self.correctors_at(k):
                abar = float(self.abars[k + 1])
                level, size = self.problem.linear_joint.level(abar), self.corrector_size * (1 - abar)
                G, b = self.guide.affine_term(level, self.beta(abar))
                P = level.precision
                corrector = AffineStep(np.eye(2) + size * (G - P), size * (P @ level.m + b), 2 * size * np.eye(2))
                for _ in range(self.corrector_steps):
                    x = propagate(x, corrector)
        return x
