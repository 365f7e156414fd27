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
NEAR = 1.5  # numbers are alike where the whole interval of their ratio lies within this factor


@dataclass(frozen=True)
class Published:
    """A published mean and standard deviation (over n - 1) of ``n`` seeds."""

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

    @property
    def near_one(self) -> bool:
        """Whether the whole interval lies within the factor NEAR of 1."""
        return self.lo > 1 / NEAR and self.hi < NEAR


def rounded(x: float) -> str:
    """Write a ratio to two significant figures, large ones without a fraction."""
    return short(f"{x:.0f}") if abs(x) >= 10 else figures_of(x, 2)


def p_words(p: float) -> str:
    """Write a p-value."""
    return "1" if p > 0.995 else short(f"{p:.2g}")


def percent(ratio: Ratio) -> str:
    """Write a ratio's distance from 1 in per cent."""
    value, lo, hi = (round(100 * (x - 1)) for x in (ratio.value, ratio.lo, ratio.hi))
    return f"{value:+d} % ({lo:+d} to {hi:+d})"


def said(text: str) -> Published:
    """Read ``mean ± SD`` as it was published."""
    mean, _, sd = text.partition(" ± ")
    return Published(float(mean), float(sd))


def written_sd(x: Published) -> str:
    """Write mean ± SD, both to the SD's second digit."""
    digits = 1 - math.floor(math.log10(x.sd))
    return short(f"{x.mean:.{digits}f} ± {x.sd:.{digits}f}")


def welch(a: Published, b: Published) -> Ratio:
    """Compare two means by Welch's test: a / b, and the interval of 1 + (a - b) / b for ``b`` as it stands.

    The difference of means has variance s_a^2 / n_a + s_b^2 / n_b and Satterthwaite's degrees of freedom (Welch
    1947). It is scaled by b's mean to be read; the interval is the difference's, and may reach below 0.
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
    """Say of a published level what ours / published allows: ``differs``, else ``holds``, else ``cannot tell``."""
    if p_adjusted < LEVEL:
        return "differs"
    return "holds" if ratio.near_one else "cannot tell"


@dataclass(frozen=True)
class Comparison:
    """A published ratio of two modes' errors beside ours; p-values are adjusted over the claims.

    Attributes:
        published: which side of 1 it lies on is the claim.
        plain: ours by the published protocol.
        plain_p: its p-value.
        mended: ours with the protocol's flaw mended.
        mended_p: its p-value.
        change_p: of the change from one to the other in the same checkpoints.
    """

    published: float
    plain: Ratio
    plain_p: float
    mended: Ratio
    mended_p: float
    change_p: float

    def side(self, ratio: Ratio, p: float) -> int:
        """Return 1 where a ratio shows the claim, -1 where it shows the reverse, 0 where it shows neither."""
        return 0 if p >= LEVEL else 1 if (ratio.value > 1) == (self.published > 1) else -1

    @property
    def verdict(self) -> str:
        """What may be said of the claim.

        ``holds``: the mended ratio shows it; ``holds, smaller`` where its whole interval lies between 1 and what was
        published. ``artefact``: only the published protocol shows it; mending changes it, and what is left is the
        reverse, or within the factor NEAR of 1. ``reversed``: the mended ratio shows the reverse. ``cannot tell``:
        anything else: that nothing is seen is no proof that there is nothing.
        """
        plain, mended = self.side(self.plain, self.plain_p), self.side(self.mended, self.mended_p)
        if mended == 1:
            up = self.published > 1
            smaller = self.mended.hi < self.published if up else self.mended.lo > self.published
            return "holds, smaller" if smaller else "holds"
        if plain == 1 and self.change_p < LEVEL and (mended == -1 or self.mended.near_one):
            return "artefact"
        return "reversed" if mended == -1 else "cannot tell"


def agrees(published: float, found: Estimate) -> bool:
    """Whether a number lies in an interval of ours that is no wider than the factor NEAR around it."""
    return found.lo <= published <= found.hi and found.lo > published / NEAR and found.hi < published * NEAR


def number_verdict(published: float, plain: Estimate, mended: Estimate, change: float) -> str:
    """Say of a published number without an error of its own what our two intervals allow.

    Returns:
        ``holds``: ours agrees with the protocol's flaw mended. ``artefact``: ours agrees by the published protocol
        only, and mending changes the same checkpoints' number. ``cannot tell``: anything else.
    """
    if agrees(published, mended):
        return "holds"
    seen = agrees(published, plain) and not mended.lo <= published <= mended.hi
    return "artefact" if seen and change < LEVEL else "cannot tell"
