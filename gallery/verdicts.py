"""Ours beside published: ratios with their intervals, and what may be said of a published claim.

Published tables give a mean and a standard deviation over a few seeds; ours have every seed. Levels are compared by
Welch's test, our own modes by the ratio paired by seed (of logarithms: errors are positive and multiply).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

from gallery.read import figures_of, short
from lightning_toys.stats import Estimate, paired_difference

LEVEL = 0.05  # below it, after Holm's adjustment, a difference counts
NEAR = 1.5  # a level is reproduced where the whole interval of ours / published lies within this factor


@dataclass(frozen=True)
class Published:
    """A published mean and standard deviation over ``n`` seeds."""

    mean: float
    sd: float
    n: int = 3


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval and the two-sided p-value of 1."""

    value: float
    lo: float
    hi: float
    p_value: float

    def __str__(self) -> str:
        value, lo, hi = (rounded(x) for x in (self.value, self.lo, self.hi))
        return f"{value} ({lo} to {hi})"


def rounded(x: float) -> str:
    """Write a ratio to two significant figures, large ones without a fraction."""
    return short(f"{x:.0f}") if abs(x) >= 10 else figures_of(x, 2)


def p_words(p: float) -> str:
    """Write a p-value."""
    return "1" if p > 0.995 else short(f"{p:.2g}")


def welch(a: Published, b: Published) -> Ratio:
    """Compare two means as a relative difference: a / b, its Welch interval over b's mean, and Welch's p-value.

    The difference of means has variance s_a^2 / n_a + s_b^2 / n_b and Satterthwaite's degrees of freedom (Welch 1947);
    ``b`` scales it to a ratio and is taken as it stands.
    """
    va, vb = a.sd**2 / a.n, b.sd**2 / b.n
    dof = (va + vb) ** 2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1))
    error, d = math.sqrt(va + vb), a.mean - b.mean
    half = float(scipy_stats.t.ppf(0.975, dof)) * error
    p = float(2 * scipy_stats.t.sf(abs(d) / error, dof))
    return Ratio(a.mean / b.mean, (a.mean - half) / b.mean, (a.mean + half) / b.mean, p)


def summed_up(values: Sequence[float]) -> Published:
    """Return mean and standard deviation of our seeds, as a published table has them."""
    x = np.asarray(values, dtype=np.float64)
    return Published(float(x.mean()), float(x.std(ddof=1)), x.size)


def paired_ratio(a: Mapping[int, float], b: Mapping[int, float]) -> Ratio:
    """Return the geometric mean over seeds of a_r / b_r with its Student-t interval.

    Raises:
        ValueError: fewer than two seeds are shared.
    """
    above, below = ({seed: math.log(v) for seed, v in x.items()} for x in (a, b))
    found = paired_difference(above, below)
    if found is None:
        raise ValueError("fewer than two seeds are shared")
    e = found.estimate
    return Ratio(math.exp(e.mean), math.exp(e.lo), math.exp(e.hi), found.p_value)


def level_verdict(ratio: Ratio, p_adjusted: float) -> str:
    """Say of a published level what ours / published allows: ``holds``, ``differs`` or ``cannot tell``."""
    if p_adjusted < LEVEL:
        return "differs"
    return "holds" if ratio.lo > 1 / NEAR and ratio.hi < NEAR else "cannot tell"


def claim_verdict(published: float, plain: tuple[float, float], mended: tuple[float, float], change: float) -> str:
    """Say of a published comparison what our runs allow.

    Args:
        published: the published ratio of two modes' errors; which side of 1 it lies on is the claim.
        plain: our ratio by the published protocol, and its adjusted p-value.
        mended: the same with the protocol's flaw mended.
        change: adjusted p-value of the change from one to the other in the same checkpoints.

    Returns:
        ``holds``: seen with the flaw mended. ``artefact``: seen by the published protocol, and mending changes it so
        that it is not seen any more, or turns it round. ``reversed``: the other way round with the flaw mended, and not
        seen by the published protocol. ``cannot tell``: anything else.
    """

    def side(found: tuple[float, float]) -> int:
        ratio, p = found
        return 0 if p >= LEVEL else 1 if (ratio > 1) == (published > 1) else -1

    a, b = side(plain), side(mended)
    if b == 1:
        return "holds"
    if a == 1 and change < LEVEL:
        return "artefact"
    return "reversed" if b == -1 and a != 1 else "cannot tell"


def number_verdict(published: float, plain: Estimate, mended: Estimate, change: float) -> str:
    """Say of a published number without an error of its own what our two intervals allow.

    Returns:
        ``holds``: our interval has it with the protocol's flaw mended. ``artefact``: only the published protocol's
        interval has it, and mending changes the same checkpoints' number. ``cannot tell``: anything else.
    """
    if mended.lo <= published <= mended.hi:
        return "holds"
    return "artefact" if plain.lo <= published <= plain.hi and change < LEVEL else "cannot tell"
