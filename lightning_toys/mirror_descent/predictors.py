"""Reverse processes from noise to data: the SDE's exponential Euler-Maruyama steps and the ODE's DDIM steps.

With h = log(abar' / abar), d log abar the clock, the reverse SDE is dx = (x / 2 + S) dh + dW and the probability-flow
ODE dx = (x + S) / 2 dh, S the (guided) score. Levels are even in log-SNR.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lightning_toys.mirror_descent.affine import Affine, Array, Law
from lightning_toys.mirror_descent.guidance import Rule
from lightning_toys.mirror_descent.joint import Joint

LOG_SNR = 10.0  # from -10 to 10, then to clean


def log_snr_levels(K: int) -> Array:
    """Return K + 1 values of abar, ascending: K even in log-SNR, and 1."""
    levels = 1 / (1 + np.exp(-np.linspace(-LOG_SNR, LOG_SNR, K)))
    return np.append(levels, 1.0)


class Move(NamedTuple):
    """A step x <- keep x + pull S(x) + N(0, variance I), S the (guided) score."""

    keep: float
    pull: float
    variance: float

    def affine(self, G: Array, g: Array) -> Affine:
        """Return the step where S(x) = G x + g."""
        return Affine(self.keep * np.eye(2) + self.pull * G, self.pull * g, self.variance * np.eye(2))


def sde_step(abar: float, to: float) -> Move:
    """Return the reverse SDE's step from abar to ``to``: the score held, the linear drift solved exactly."""
    h = math.log(to / abar)
    return Move(math.exp(h / 2), 2 * math.expm1(h / 2), math.expm1(h))


def ode_step(abar: float, to: float) -> Move:
    """Return DDIM's step (Song et al. 2021): x_0 and eps implied by the score are held, and noised anew."""
    left = 1 - abar
    to_clean = math.sqrt(to / abar)
    return Move(to_clean, to_clean * left - math.sqrt(max(0.0, 1 - to) * left), 0.0)


Step = Callable[[float, float], Move]
STEPS: dict[str, Step] = {"sde": sde_step, "ode": ode_step}


def plan(joint: Joint, rule: Rule, beta: Callable[[float], float], abars: Sequence[float], step: Step) -> list[Affine]:
    """Return every step of a guided reverse process over the levels ``abars``."""
    out = []
    for abar, to in itertools.pairwise(abars):
        level = joint.level(abar)
        G, g = rule.added(level, beta(abar))
        P = level.precision
        out.append(step(abar, to).affine(G - P, P @ level.m + g))
    return out


def start(joint: Joint, abar: float) -> Law:
    """Return the law that a reverse process starts from: the joint at its noisiest level."""
    level = joint.level(abar)
    return Law(level.m, level.C)
