"""Which tests of particles hold: groups whose estimates of Z are few, skewed or uneven.

A group of N particles that estimates Z without bias by Z_g has, for the mean f_g of any f over its draws, E[Z_g f_g] =
Z E f. So E f_g - E f = -Cov(Z_g / Z, f_g), which Cauchy and Schwarz bound by the coefficient of variation of Z_g times
the deviation of f_g. The mean over G groups has a standard error of that deviation / sqrt(G): no moment's bias is more
than sqrt(G) times the coefficient of variation, in standard errors. It is taken off before moments are judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_toys.mirror_descent.diagnostics import Sample
from lightning_toys.mirror_descent.joint import Array

SKEWED = "skewed"  # the source of checks that are left out for that
MOST_NATS = 200.0  # that an estimate of log Z counts as too large: squares of what is more have no number
COCHRAN = 25  # a mean of n values may be taken for normal where n exceeds this times their skewness squared


def group_estimates(samples: Sequence[Sample], log_z: float = math.nan) -> Array:
    """Return all groups' estimates of Z (G,), divided by Z; by the greatest of them where Z is not given."""
    found = np.array([v for sample in samples for v in (sample.extra or {}).get("log_z", [])], np.float64)
    if not len(found):
        return found
    away = found - (found.max() if math.isnan(log_z) else log_z)
    out: Array = np.exp(np.minimum(away, MOST_NATS))
    return out


def too_skewed(values: Array) -> bool:
    """Whether a t-test of the mean of values does not hold (Cochran 1977, Sampling Techniques, equation 2.24).

    Their skewness is taken less its standard error, sqrt(6 / n): of few values it is mostly chance.

    >>> too_skewed(np.array([1.0, 1.2, 0.9, 1.1])), too_skewed(np.array([0.1] * 99 + [20.0])), too_skewed(np.ones(5))
    (False, True, False)
    """
    if len(values) < 2:
        return False
    scaled = values / (np.abs(values).max() or 1.0)  # cubes of large numbers have no number
    away = scaled - scaled.mean()
    square = float(np.square(away).mean())
    if square <= (1e-12 * abs(scaled.mean())) ** 2:
        return False
    skewness = max(0.0, abs(float((away**3).mean())) / square**1.5 - math.sqrt(6 / len(values)))
    return bool(len(values) <= COCHRAN * skewness**2)


def limit_bias(estimates: Array) -> float:
    """Return the bound of any moment's bias, in standard errors, from the groups' estimates of Z (G,); 0 for none.

    >>> limit_bias(np.array([0.5, 1.5] * 8)), limit_bias(np.ones(3)), limit_bias(np.array([]))
    (2.0, 0.0, 0.0)
    """
    if len(estimates) < 2:
        return 0.0
    return float(math.sqrt(len(estimates)) * estimates.std() / estimates.mean())
