"""Exact laws of Gaussian chains: every step x <- A x + b + N(0, D) is carried through in mean and covariance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_toys.mirror_descent.joint import Gaussian, Level

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """x <- A x + b + N(0, D), in two dimensions."""

    A: Array
    b: Array
    D: Array


@dataclass(frozen=True)
class Law(Gaussian):
    """A Gaussian law that steps are taken from."""

    def after(self, step: Affine) -> Law:
        """Return the law one step later."""
        return Law(step.A @ self.m + step.b, step.A @ self.C @ step.A.T + step.D)


def refresh(level: Level) -> Affine:
    """Return the exact draw of s' | a at a level."""
    return Affine(np.array([[1.0, 0.0], [level.rho, 0.0]]), np.array([0.0, level.c]), np.diag([0.0, level.v]))
