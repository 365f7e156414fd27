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


def wilson_interval(k: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Return the ends of Wilson's interval of a probability, of which k in n trials came out.

    Example:
        >>> [round(end, 3) for end in wilson_interval(1, 8)]
        [0.022, 0.471]
    """
    found = scipy_stats.binomtest(round(k), round(n)).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def share_interval(rows: np.ndarray, count: float, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends, each (T,), of the interval of a share's mean p over R replicas: within [0, 1], the mean inside.

    Student's t at logit p, by the delta method: logit p -+ t se / (p (1 - p)). se is that of the replicas' spread, and
    at least that of R n independent samples, which replicas that happen to agree do not undercut. p is read as
    (k + 1/2) / (R n + 1) there, since 0 has no logit. Where all replicas agree it is Wilson's interval of R n samples.

    Args:
        rows: shares (R, T), R >= 2.
        count: n, samples of which each is a share; ``math.inf`` of a number in [0, 1] that is no share of samples, such
            as a total variation: then the spread alone counts, and values that agree have no width.
        level: of the interval.

    Example:
        >>> low, high = share_interval(np.array([[0.0], [0.0], [0.5]]), 10_000)
        >>> bool(0 < low[0] < 0.5 / 3 < high[0] < 1)
        True
    """
    R, mean = len(rows), rows.mean(0)
    low, high, total = mean.copy(), mean.copy(), R * count
    for j in range(rows.shape[1]):
        column, p = rows[:, j], float(mean[j])
        if np.ptp(column) == 0:
            ends = wilson_interval(total * p, total, level) if np.isfinite(count) else (p, p)
        else:
            p = (total * p + 0.5) / (total + 1) if np.isfinite(count) else p
            se = np.sqrt(max(column.var(ddof=1) / R, p * (1 - p) / total))
            half = t_quantile((1 + level) / 2, R - 1) * se / (p * (1 - p))
            with np.errstate(over="ignore"):
                ends = tuple(1 / (1 + np.exp(-(np.log(p) - np.log1p(-p) + sign * half))) for sign in (-1, 1))
        # the half sample moves p, of shares of less than one sample beyond the interval
        low[j], high[j] = min(ends[0], mean[j]), max(ends[1], mean[j])
    return low, high


def share_ci(values: Sequence[float] | np.ndarray, count: float, level: float = 0.95) -> Estimate:
    """Return the mean of shares over replicas, and an interval of it within [0, 1].

    Args:
        values: a share of each replica.
        count: samples of which each is a share: :func:`share_interval`. With 1, values of 0 and 1 say what a replica
            did or did not: Wilson's interval of how many did.
        level: of the interval.

    Raises:
        ValueError: ``values`` is empty.

    Example:
        >>> found = share_ci([1, 0, 0, 0, 0, 0, 0, 0], 1)
        >>> found.mean, round(found.lo, 3), round(found.hi, 3)
        (0.125, 0.022, 0.471)
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("share_ci needs at least one value")
    mean, n = float(x.mean()), int(x.size)
    if count == 1 and np.isin(x, (0.0, 1.0)).all():
        return Estimate(mean, *wilson_interval(float(x.sum()), n, level), n)
    if n == 1 or not np.isfinite(x).all():
        return Estimate(mean, float("nan"), float("nan"), n)
    low, high = share_interval(x[:, None], count, level)
    return Estimate(mean, float(low[0]), float(high[0]), n)


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


NO_LIMITS = (-math.inf, math.inf)
NOT_NEGATIVE = (0.0, math.inf)
A_SHARE = (0.0, 1.0)


def format_estimate(estimate: Estimate, plus_minus: str = " ± ", limits: tuple[float, float] = NO_LIMITS) -> str:
    """Format mean ± half-width, both to the half-width's second digit; without an interval the mean alone.

    Args:
        estimate: what is written.
        plus_minus: between the two.
        limits: least and greatest value of the quantity. An interval that reaches beyond them is cut there, and its
            ends are written in the place of its half-width.

    >>> format_estimate(Estimate(0.12345, 0.10345, 0.14345, 8))
    '0.123 ± 0.020'
    >>> format_estimate(Estimate(1.87e-6, -5.9e-6, 9.7e-6, 4))
    '1.9e-06 ± 7.8e-06'
    >>> format_estimate(Estimate(0.01, -0.012, 0.032, 4), limits=NOT_NEGATIVE)
    '0.010 [0, 0.032]'
    """
    if math.isnan(estimate.half_width):
        return f"{estimate.mean:.4g}"
    half = estimate.half_width
    if math.isinf(half):
        return f"{estimate.mean:.4g}{plus_minus}inf"
    digits = 1 - math.floor(math.log10(half)) if half > 0 else 4
    short = digits > 6 or digits < -2 or abs(estimate.mean) >= 1e15  # written out it would be all digits
    digits = digits if short else max(digits, 0)

    def written(x: float) -> str:
        if not short:
            return f"{x:.{digits}f}"
        if not half:
            return f"{x:.4g}"
        x = round(x, digits)  # at the half-width's second digit; before its figures are counted
        figures = math.floor(math.log10(abs(x)) + 1e-9) + 1 + digits if x else 0
        return f"{x:#.{min(max(figures, 1), 15)}g}".replace(".e", "e").rstrip(".") if x else "0"

    if estimate.lo < limits[0] or estimate.hi > limits[1]:
        ends = (
            f"{limit:g}" if beyond else written(end)
            for end, limit, beyond in (
                (estimate.lo, limits[0], estimate.lo < limits[0]),
                (estimate.hi, limits[1], estimate.hi > limits[1]),
            )
        )
        return f"{written(estimate.mean)} [{', '.join(ends)}]"
    return f"{written(estimate.mean)}{plus_minus}{written(half)}"
