"""Moment propagation through affine-Gaussian transitions x <- A x + b + N(0, D): exact mean and covariance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_toys.mirror_descent.joint import Gaussian, NoiseLevel

Array = NDArray[np.float64]


@dataclass(frozen=True)
class AffineStep:
    """A Markov transition x <- A x + b + N(0, D).

    Attributes:
        A: matrix (2, 2).
        b: offset (2,).
        D: covariance of the noise (2, 2), possibly singular.
    """

    A: Array
    b: Array
    D: Array


def propagate(x: Gaussian, step: AffineStep) -> Gaussian:
    """Return the distribution of x after a step: N(A m + b, A C A' + D)."""
    return Gaussian(step.A @ x.m + step.b, step.A @ x.C @ step.A.T + step.D)


def refresh(level: NoiseLevel) -> AffineStep:
    """Return the transition that replaces s' by an exact draw of s' | a at a level."""
    return AffineStep(np.array([[1.0, 0.0], [level.rho, 0.0]]), np.array([0.0, level.c]), np.diag([0.0, level.v]))


def covariance_root(C: Array) -> Array:
    """Return L (d, d) with L L' = C: the Cholesky factor, or where the diagonal has zeros the root of the diagonal."""
    L: Array = (np.linalg.cholesky(C) if np.all(np.diag(C) > 0) else np.sqrt(np.diag(np.diag(C)))).astype(np.float64)
    return L


def reverse_kernel(noisy: NoiseLevel, cleaner: NoiseLevel) -> AffineStep:
    """Return the exact distribution of x at the cleaner level given x at the noisy one: A x + b + N(0, D).

    x_noisy = g x_cleaner + noise of variance 1 - g^2, g^2 = abar_noisy / abar_cleaner.
    """
    g = math.sqrt(noisy.abar / cleaner.abar)
    gain = g * cleaner.C @ noisy.precision
    return AffineStep(gain, cleaner.m - gain @ noisy.m, cleaner.C - g * gain @ cleaner.C)
