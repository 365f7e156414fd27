"""Reverse processes from noise to data: the SDE's exponential Euler-Maruyama steps and the ODE's DDIM steps.

With h = log(abar' / abar), d log abar the clock, the reverse SDE is dx = (x / 2 + S) dh + dW and the probability-flow
ODE dx = (x + S) / 2 dh, S the (guided) score. Levels are even in log-SNR.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from lightning_toys.mirror_descent.affine import Affine, Array, Law
from lightning_toys.mirror_descent.guidance import Rule
from lightning_toys.mirror_descent.joint import Joint

LOG_SNR = 10.0  # from -10 to 10, then to clean


def log_snr_levels(K: int) -> Array:
    """Return K + 1 values of abar, ascending: K even in log-SNR, and 1."""
    levels = 1 / (1 + np.exp(-np.linspace(-LOG_SNR, LOG_SNR, K)))
    return np.append(levels, 1.0)


def sde_step(S: Array, s: Array, abar: float, to: float) -> Affine:
    """Return the reverse SDE's step from abar to ``to``: the score S x + s held, the linear drift solved exactly."""
    h = math.log(to / abar)
    grown, weight = math.exp(h / 2), 2 * math.expm1(h / 2)
    return Affine(grown * np.eye(2) + weight * S, weight * s, math.expm1(h) * np.eye(2))


def ode_step(S: Array, s: Array, abar: float, to: float) -> Affine:
    """Return DDIM's step (Song et al. 2021): x_0 and eps implied by the score are held, and noised anew."""
    left = 1 - abar
    to_clean, to_noise = math.sqrt(to / abar), math.sqrt(max(0.0, 1 - to) * left)
    gain = to_clean * left - to_noise
    return Affine(to_clean * np.eye(2) + gain * S, gain * s, np.zeros((2, 2)))


Step = Callable[[Array, Array, float, float], Affine]
STEPS: dict[str, Step] = {"sde": sde_step, "ode": ode_step}


def plan(joint: Joint, rule: Rule, beta: Callable[[float], float], abars: Sequence[float], step: Step) -> list[Affine]:
    """Return every step of a guided reverse process over the levels ``abars``."""
    out = []
    for abar, to in itertools.pairwise(abars):
        level = joint.level(abar)
        G, g = rule.added(level, beta(abar))
        P = level.precision
        out.append(step(G - P, P @ level.m + g, abar, to))
    return out


def start(joint: Joint, abar: float) -> Law:
    """Return the law that a reverse process starts from: the joint at its noisiest level."""
    level = joint.level(abar)
    return Law(level.m, level.C)
