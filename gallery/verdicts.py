"""Ours beside published: ratios with their intervals, and what may be said of a published level or claim.

Errors are positive and multiply, so that all of it is about logarithms of the seeds' values, and means are geometric.
Whoever draws up a family of comparisons hands it over whole: p-values are adjusted within it by Holm's rule.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

from gallery.read import figures_of, short
from lightning_toys.stats import holm

LEVEL = 0.05  # below it, after Holm's adjustment, a test counts
NEAR = 1.5  # numbers are alike where their ratio lies within this factor of 1


@dataclass(frozen=True)
class Ratio:
    """A ratio of geometric means: Student's t of its logarithm.

    Attributes:
        log: logarithm of the ratio.
        error: its standard error; 0 where the values do not vary.
        dof: degrees of freedom.
    """

    log: float
    error: float
    dof: float

    def above(self, log: float) -> float:
        """Return the one-sided p-value against "the ratio's logarithm is at most ``log``"."""
        if self.error == 0:
            return 0.0 if self.log > log else 1.0
        return float(scipy_stats.t.sf((self.log - log) / self.error, self.dof))

    def below(self, log: float) -> float:
        """Return the one-sided p-value against "the ratio's logarithm is at least ``log``"."""
        return Ratio(-self.log, self.error, self.dof).above(-log)

    @property
    def value(self) -> float:
        """The ratio."""
        return math.exp(self.log)

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the 95 % interval."""
        half = float(scipy_stats.t.ppf(0.975, self.dof)) * self.error
        return math.exp(self.log - half), math.exp(self.log + half)

    @property
    def p_value(self) -> float:
        """Two-sided, against a ratio of 1."""
        return min(1.0, 2 * min(self.above(0), self.below(0)))

    @property
    def p_near(self) -> float:
        """:meth:`within` of the factor NEAR."""
        return self.within(NEAR)

    def within(self, factor: float) -> float:
        """Return the p-value of two one-sided tests (Schuirmann 1987): small where the ratio is that near to 1."""
        return max(self.above(-math.log(factor)), self.below(math.log(factor)))

    @property
    def p_not_above(self) -> float:
        """One-sided: small where the ratio lies below NEAR, whether or not it is below 1."""
        return self.below(math.log(NEAR))

    def __str__(self) -> str:
        lo, hi = (rounded(x) for x in self.ends)
        return f"{rounded(self.value)} ({lo} to {hi})"


def rounded(x: float) -> str:
    """Write a ratio to two significant figures, large ones without a fraction."""
    return short(f"{x:.0f}") if 10 <= abs(x) < 1e4 else short(f"{x:.1e}") if abs(x) >= 1e4 else figures_of(x, 2)


def p_words(p: float) -> str:
    """Write a p-value."""
    return "1" if p > 0.995 else short(f"{p:.2g}")


def logs(values: Iterable[float]) -> np.ndarray:
    """Return the logarithms of positive values.

    Raises:
        ValueError: fewer than two, or one is not positive.
    """
    x = np.asarray(list(values), dtype=np.float64)
    if x.size < 2 or not (x > 0).all():
        raise ValueError(f"two positive values or more are wanted, not {x.tolist()}")
    return np.log(x)


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive values."""
    return math.exp(float(logs(values).mean()))


def welch_ratio(a: Iterable[float], b: Iterable[float]) -> Ratio:
    """Compare the geometric means of independent seeds, a / b, by Welch's test of the logarithms.

    The difference of the means has variance s_a^2 / n_a + s_b^2 / n_b, s^2 with n - 1 in the denominator, and
    Satterthwaite's degrees of freedom.
    """
    x, y = logs(a), logs(b)
    va, vb = x.var(ddof=1) / x.size, y.var(ddof=1) / y.size
    total = float(va + vb)
    dof = total**2 / float(va**2 / (x.size - 1) + vb**2 / (y.size - 1)) if total > 0 else x.size + y.size - 2.0
    return Ratio(float(x.mean() - y.mean()), math.sqrt(total), dof)


def paired_ratio(a: Mapping[int, float], b: Mapping[int, float]) -> Ratio:
    """Return the geometric mean over seeds of a_r / b_r, by the paired t-test of the logarithms.

    Raises:
        ValueError: fewer than two seeds are shared, or a value is not positive.
    """
    shared = sorted(set(a) & set(b))
    d = logs(a[s] for s in shared) - logs(b[s] for s in shared)
    return Ratio(float(d.mean()), float(d.std(ddof=1) / math.sqrt(d.size)), d.size - 1.0)


@dataclass(frozen=True)
class Level:
    """What may be said of one published level; p-values are adjusted over the family."""

    ratio: Ratio
    p_value: float
    p_near: float

    @property
    def verdict(self) -> str:
        """``reproduced``: within a factor of 1.5; ``differs``; ``differs, within 1.5``; else ``cannot tell``."""
        words = ["differs"] if self.p_value < LEVEL else []
        near = self.p_near < LEVEL
        return ", ".join([*words, f"within {NEAR}"] if words and near else words) or (
            "reproduced" if near else "cannot tell"
        )


def levels(ratios: Sequence[Ratio]) -> list[Level]:
    """Return what may be said of each of a family of ratios, ours / published."""
    different, near = holm([r.p_value for r in ratios]), holm([r.p_near for r in ratios])
    return [Level(*x) for x in zip(ratios, different.tolist(), near.tolist(), strict=True)]


@dataclass(frozen=True)
class Comparison:
    """One comparison under a claim that A's error is smaller than B's: ratios A / B of our seeds.

    Attributes:
        plain: by the published protocol.
        mended: with its flaws mended.
        change: mended / plain of the same checkpoints.
        alone: what each flaw mended alone adds to the logarithm of the ratio.
    """

    plain: Ratio
    mended: Ratio
    change: Ratio
    alone: Mapping[str, float]

    @property
    def causes(self) -> list[str]:
        """The flaws that, mended alone, make at least half of the change; all of them together where none does."""
        found = [name for name, log in self.alone.items() if log * self.change.log >= self.change.log**2 / 2]
        return found or ["all of it together"]


def side(ratio: Ratio, p: float) -> int:
    """Return 1 where a ratio is surely below 1, -1 where it is surely above, 0 where neither is seen."""
    return 0 if p >= LEVEL else 1 if ratio.log < 0 else -1


def claim_verdicts(comparisons: Sequence[Comparison], ties_hold: bool = False) -> list[str]:
    """Say of each of a claim's comparisons what it shows; the claim's comparisons are one family.

    ``holds``: the mended ratio is below 1; with ``ties_hold`` (of "matches or exceeds") it is enough that it is
    surely below NEAR. ``artefact``: the published protocol shows it, mending changes it, and what is left is the
    reverse, or within the factor NEAR of 1. ``reversed``: the mended ratio is above 1. ``cannot tell``: anything
    else; that nothing is seen is no proof that there is nothing.
    """
    wanted: dict[str, Callable[[Comparison], float]] = {
        "plain": lambda c: c.plain.p_value,
        "plain tie": lambda c: c.plain.p_not_above,
        "mended": lambda c: c.mended.p_value,
        "tie": lambda c: c.mended.p_not_above,
        "near": lambda c: c.mended.p_near,
        "change": lambda c: c.change.p_value,
    }
    p = {name: holm([get(c) for c in comparisons]).tolist() for name, get in wanted.items()}
    out = []
    for k, c in enumerate(comparisons):
        mended, plain = side(c.mended, p["mended"][k]), side(c.plain, p["plain"][k])
        shown = plain == 1 or (ties_hold and p["plain tie"][k] < LEVEL)
        if mended == 1 or (ties_hold and p["tie"][k] < LEVEL):
            out.append("holds")
        elif shown and p["change"][k] < LEVEL and (mended == -1 or p["near"][k] < LEVEL):
            out.append("artefact")
        else:
            out.append("reversed" if mended == -1 else "cannot tell")
    return out


def claim_verdict(words: Sequence[str], causes: Sequence[Sequence[str]] = ()) -> str:
    """Say of a claim that is made for all of its comparisons what they leave of it.

    ``reversed``: one at least is surely the other way round, so that it is not true of all. Else ``artefact of ...``:
    one at least is; of what most of these are. Else ``holds``: every one does. Else ``cannot tell``.

    Args:
        words: of :func:`claim_verdicts`.
        causes: :attr:`Comparison.causes` of each, where one is an artefact.
    """
    if "reversed" in words:
        return "reversed"
    if "artefact" in words:
        found = Counter(c for word, names in zip(words, causes, strict=True) if word == "artefact" for c in names)
        most = max(found.values())
        return "artefact of " + " and ".join(c for c, n in found.items() if n == most)
    return "holds" if words and set(words) == {"holds"} else "cannot tell"
