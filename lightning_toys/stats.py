"""Mean, confidence interval and paired comparison over replicas; thin over scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats as scipy_stats


@dataclass(frozen=True)
class Estimate:
    """A mean over replicas with its Student-t interval.

    Attributes:
        mean: the mean.
        lo: lower end of the interval; NaN if n = 1.
        hi: upper end; likewise.
        n: number of replicas.
    """

    mean: float
    lo: float
    hi: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's width; NaN if n = 1, infinite where no double holds it."""
        return self.hi / 2 - self.lo / 2


def safe_scale(*values: np.ndarray) -> float:
    """Return a power of two by which values are divided so that sums of their squares neither overflow nor vanish.

    It is 1 for all but extreme values, and a division by it is exact.
    """
    top = max((float(np.abs(v).max(initial=0.0)) for v in values), default=0.0)
    return 2.0 ** (math.frexp(top)[1] - 1) if top > 1e100 or 0 < top < 1e-100 else 1.0


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution, kept: scipy takes .1 ms for it, at every row that is logged."""
    return float(scipy_stats.t.ppf(probability, degrees))


def mean_ci(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Estimate:
    """Return the mean of ``values`` and the Student-t confidence interval of their expectation.

    Values up to the greatest double are fine; an end of the interval that no double reaches is infinite.

    Raises:
        ValueError: ``values`` is empty.

    Example:
        >>> estimate = mean_ci([1.0, 2.0, 3.0])
        >>> round(estimate.mean, 3), round(estimate.lo, 3), round(estimate.hi, 3)
        (2.0, -0.484, 4.484)
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("mean_ci needs at least one value")
    scale = safe_scale(x)
    x = x / scale
    mean = float(x.mean())
    if x.size == 1:
        return Estimate(mean * scale, float("nan"), float("nan"), 1)
    half = float(t_quantile((1 + level) / 2, x.size - 1) * x.std(ddof=1) / np.sqrt(x.size))
    return Estimate(mean * scale, (mean - half) * scale, (mean + half) * scale, int(x.size))


def geometric_ci(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Estimate | None:
    """Return the geometric mean of positive values and its interval: that of the mean logarithm, exponentiated.

    For errors, whose size varies by factors: one bad seed does not carry the mean, and no end lies below 0. None where
    a value is not positive and finite.

    Raises:
        ValueError: ``values`` is empty.

    Example:
        >>> estimate = geometric_ci([1.0, 10.0, 100.0])
        >>> round(estimate.mean, 6), round(estimate.lo, 3), round(estimate.lo * estimate.hi, 6)
        (10.0, 0.033, 100.0)
    """
    x = np.asarray(values, dtype=np.float64)
    if not (np.isfinite(x) & (x > 0)).all():
        return None
    e = mean_ci(np.log(x), level)
    with np.errstate(over="ignore"):
        mean, lo, hi = (float(v) for v in np.exp([e.mean, e.lo, e.hi]))
    return Estimate(mean, lo, hi, e.n)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a_r - b_r over the seeds that both runs share, with its interval and two-sided t-test p-value.

    Of :func:`paired_ratio` the geometric mean of a_r / b_r, likewise.
    """

    estimate: Estimate
    p_value: float


def paired_difference(a: dict[int, float], b: dict[int, float], level: float = 0.95) -> PairedDifference | None:
    """Compare two runs by a paired t-test; each maps seed to value. ``None`` where they share fewer than two seeds."""
    shared = sorted(set(a) & set(b))
    if len(shared) < 2:
        return None
    left, right = (np.array([float(x[s]) for s in shared]) for x in (a, b))
    scale = safe_scale(left, right)
    d = left / scale - right / scale
    e = mean_ci(d, level)
    estimate = Estimate(e.mean * scale, e.lo * scale, e.hi * scale, e.n)
    spread = float(d.std(ddof=1))
    if spread <= 1e-12 * float(np.abs(d).max()):
        # equal everywhere, or shifted by a constant, up to rounding: the t statistic is 0/0, infinite or noise
        return PairedDifference(estimate, 1.0 if estimate.mean == 0.0 else 0.0)
    return PairedDifference(estimate, float(scipy_stats.ttest_1samp(d, 0.0).pvalue))


def paired_ratio(a: dict[int, float], b: dict[int, float], level: float = 0.95) -> PairedDifference | None:
    """Compare two runs of positive values by the ratio of their geometric means: the t-test of paired log ratios.

    ``None`` where they share fewer than two seeds, or a value of theirs is not positive and finite.

    >>> found = paired_ratio({0: 2.0, 1: 6.0, 2: 8.0}, {0: 1.0, 1: 2.0, 2: 2.0})
    >>> round(found.estimate.mean**3, 6)  # 2 x 3 x 4
    24.0
    """
    shared = sorted(set(a) & set(b))
    if not all(math.isfinite(v) and v > 0 for s in shared for v in (a[s], b[s])):
        return None
    left, right = ({s: math.log(x[s]) for s in shared} for x in (a, b))
    found = paired_difference(left, right, level)
    if found is None:
        return None
    e = found.estimate
    with np.errstate(over="ignore"):
        ratio, lo, hi = (float(v) for v in np.exp([e.mean, e.lo, e.hi]))
    return PairedDifference(Estimate(ratio, lo, hi, e.n), found.p_value)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjust p-values for several comparisons by Holm's step-down rule (Holm 1979).

    adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)) over the sorted p-values, returned in the order given.

    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    scaled = np.minimum(1.0, p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted


def format_estimate(estimate: Estimate, plus_minus: str = " ± ") -> str:
    """Format mean ± half-width, both to the half-width's second digit; without an interval the mean alone.

    >>> format_estimate(Estimate(0.12345, 0.10345, 0.14345, 8))
    '0.123 ± 0.020'
    """
    if math.isnan(estimate.half_width):
        return f"{estimate.mean:.4g}"
    half = estimate.half_width
    if math.isinf(half):
        return f"{estimate.mean:.4g}{plus_minus}inf"
    digits = 1 - math.floor(math.log10(half)) if half > 0 else 4
    if digits > 6 or digits < -2 or abs(estimate.mean) >= 1e15:  # written out it would be all digits
        return f"{estimate.mean:.4g}{plus_minus}{half:.2g}"
    digits = max(digits, 0)
    return f"{estimate.mean:.{digits}f}{plus_minus}{half:.{digits}f}"
