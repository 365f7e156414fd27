"""How straight a change of entropy is in the step size: fits over the sizes at which it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LinearFit:
    """Least squares of changes y on step sizes eta through the origin, where the change is 0 by definition.

    Each point has the weight 1 / eta^2, so that y / eta counts alike at every eta: step sizes usually span decades, and
    the greatest alone would decide otherwise.

    Attributes:
        slope: b of y = b eta, per unit of eta: the mean of y / eta.
        r2: 1 - sum (y / eta - b)^2 / sum (y / eta)^2; 1 where the points lie on a straight line through 0.
        quadratic: a and c of y = a eta + c eta^2 / 2, by the same weights; NaN with fewer than three step sizes.
        quadratic_r2: of that curve.
    """

    slope: float
    r2: float
    quadratic: tuple[float, float]
    quadratic_r2: float


def linear_fit(etas: Sequence[float], changes: Sequence[float]) -> LinearFit:
    """Fit changes that were measured at several step sizes.

    Args:
        etas: step sizes, > 0, each once.
        changes: as many.

    Raises:
        ValueError: there are none, or not as many changes as step sizes.

    >>> fit = linear_fit([0.1, 0.2, 0.4], [0.21, 0.44, 0.96])  # 2 eta + 2 eta^2 / 2
    >>> round(fit.slope, 4), round(fit.r2, 4), round(fit.quadratic[1], 4), round(fit.quadratic_r2, 4)
    (2.2333, 0.9969, 2.0, 1.0)
    """
    if not len(etas) or len(etas) != len(changes):
        raise ValueError(f"{len(changes)} changes at {len(etas)} step sizes")
    x, y = np.array(etas, dtype=np.float64), np.array(changes, dtype=np.float64)
    z = y / x
    slope = float(z.mean())
    quadratic, of_curve = (np.nan, np.nan), np.nan
    if len(x) >= 3:
        A = np.stack([np.ones_like(x), x / 2], 1)
        found = np.linalg.lstsq(A, z, rcond=None)[0]
        quadratic, of_curve = (float(found[0]), float(found[1])), explained(z, A @ found)
    return LinearFit(slope, explained(z, np.full_like(z, slope)), quadratic, of_curve)


def explained(values: np.ndarray, fitted: np.ndarray) -> float:
    """Return 1 - |values - fitted|^2 / |values|^2; NaN where all values are 0."""
    size = float((values**2).sum())
    return float(1 - ((values - fitted) ** 2).sum() / size) if size > 0 else float("nan")
