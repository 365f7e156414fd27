"""Discretised reverse processes from noise to data: the SDE by exponential Euler-Maruyama, the ODE by DDIM.

With h = log(abar' / abar), so that time is log abar, the reverse SDE is dx = (x / 2 + S) dh + dW and the
probability-flow ODE dx = (x + S) / 2 dh, S the (guided) score (Song et al. 2021, arXiv 2011.13456). Levels are even in
log-SNR.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lightning_toys.mirror_descent.affine import AffineStep, Array
from lightning_toys.mirror_descent.guidance import GuidanceRule
from lightning_toys.mirror_descent.joint import LinearGaussianJoint

MAX_LOG_SNR = 10.0  # levels go from -10 to 10, then to clean


def log_snr_levels(K: int) -> Array:
    """Return abar of K + 1 levels (K + 1,), ascending: K even in log-SNR = log(abar / (1 - abar)), and 1."""
    levels = 1 / (1 + np.exp(-np.linspace(-MAX_LOG_SNR, MAX_LOG_SNR, K)))
    return np.append(levels, 1.0)


class ReverseStep(NamedTuple):
    """A step x <- x_scale x + score_scale S(x) + N(0, variance I), S the (guided) score."""

    x_scale: float
    score_scale: float
    variance: float

    def affine(self, G: Array, g: Array) -> AffineStep:
        """Return the step where S(x) = G x + g."""
        return AffineStep(
            self.x_scale * np.eye(2) + self.score_scale * G, self.score_scale * g, self.variance * np.eye(2)
        )


def sde_step(abar: float, next_abar: float) -> ReverseStep:
    """Return the reverse SDE's exponential Euler-Maruyama step: the score held, the linear drift solved exactly."""
    h = math.log(next_abar / abar)
    return ReverseStep(math.exp(h / 2), 2 * math.expm1(h / 2), math.expm1(h))


def ode_step(abar: float, next_abar: float) -> ReverseStep:
    """Return DDIM's step (Song et al. 2021, arXiv 2010.02502): x_0 and eps of the score, noised to the next level."""
    noise_variance = 1 - abar
    scale = math.sqrt(next_abar / abar)
    score_scale = scale * noise_variance - math.sqrt(max(0.0, 1 - next_abar) * noise_variance)
    return ReverseStep(scale, score_scale, 0.0)


def ddim_step(abar: float, next_abar: float, eta: float) -> ReverseStep:
    """Return DDIM's step with noise (Song et al. 2021, arXiv 2010.02502, equations 12 and 16).

    x' = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma z with x_0 and eps of the score and
    sigma^2 = eta^2 (1 - abar') / (1 - abar) (1 - abar / abar'). At eta 0 it is :func:`ode_step`; at 1 the posterior
    of DDPM's ancestral sampling, q(x' | x, x_0) at the denoised x_0 (Ho et al. 2020, arXiv 2006.11239, equation 7).

    >>> ddim_step(0.3, 0.7, 0.0) == ode_step(0.3, 0.7)
    True
    """
    noise_variance, next_variance = 1 - abar, max(0.0, 1 - next_abar)
    variance = eta**2 * next_variance / noise_variance * (1 - abar / next_abar)
    scale = math.sqrt(next_abar / abar)
    score_scale = scale * noise_variance - math.sqrt((next_variance - variance) * noise_variance)
    return ReverseStep(scale, score_scale, variance)


StepRule = Callable[[float, float], ReverseStep]  # of (abar, next_abar)
STEP_RULES: dict[str, StepRule] = {"sde": sde_step, "ode": ode_step}


def guided_steps(
    joint: LinearGaussianJoint,
    rule: GuidanceRule,
    beta: Callable[[float], float],
    abars: Sequence[float],
    step_rule: StepRule,
) -> list[AffineStep]:
    """Return every step of a guided reverse process with the exact score.

    Args:
        joint: the clean distribution.
        rule: adds its term to the score.
        beta: the schedule, of abar.
        abars: levels, noisy to clean.
        step_rule: the discretisation.
    """
    out = []
    for abar, next_abar in itertools.pairwise(abars):
        level = joint.level(abar)
        G, g = rule.affine_term(level, beta(abar))
        P = level.precision
        out.append(step_rule(abar, next_abar).affine(G - P, P @ level.m + g))
    return out
