"""Verdicts on published numbers: the statistics are scipy's, and the words follow from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from gallery.verdicts import (
    Comparison,
    Published,
    Ratio,
    level_verdict,
    number_verdict,
    p_words,
    paired_ratio,
    percent,
    rounded,
    said,
    summed_up,
    welch,
    written_sd,
)
from lightning_toys.stats import Estimate

A, B = [0.31, 0.52, 0.47, 0.88], [0.11, 0.16, 0.12]


def test_welch_is_scipy_s() -> None:
    found = welch(summed_up(A), summed_up(B))
    wanted = scipy_stats.ttest_ind(A, B, equal_var=False)
    interval = wanted.confidence_interval()
    mean = float(np.mean(B))
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-10)
    assert found.value == pytest.approx(np.mean(A) / mean, rel=1e-12)
    # a / b - 1 = (a - b) / b
    assert (found.lo - 1) * mean == pytest.approx(interval.low, rel=1e-10)
    assert (found.hi - 1) * mean == pytest.approx(interval.high, rel=1e-10)
    student = scipy_stats.ttest_ind(A, B).pvalue
    assert found.p_value != pytest.approx(student, rel=0.05)  # equal variances would be another test


def test_summed_up_has_the_sample_s_deviation() -> None:
    found = summed_up([1.0, 2.0, 4.0])
    assert found == Published(pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3)), 3)  # type: ignore[arg-type]


def test_the_paired_ratio_is_a_paired_t_test_of_logarithms() -> None:
    a, b = {3: 0.2, 1: 0.5, 2: 0.9}, {1: 0.1, 2: 0.3, 3: 0.02, 9: 1.0}
    found = paired_ratio(a, b)
    seeds = (1, 2, 3)
    wanted = scipy_stats.ttest_rel([math.log(a[s]) for s in seeds], [math.log(b[s]) for s in seeds])
    interval = wanted.confidence_interval()
    assert found.value == pytest.approx((5 * 3 * 10) ** (1 / 3), rel=1e-12)
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-10)
    assert (math.log(found.lo), math.log(found.hi)) == pytest.approx((interval.low, interval.high), rel=1e-10)
    turned = paired_ratio(b, a)
    assert turned.value == pytest.approx(1 / found.value)
    assert turned.lo == pytest.approx(1 / found.hi)
    with pytest.raises(ValueError, match="fewer than two"):
        paired_ratio({1: 1.0}, b)


@pytest.mark.parametrize(
    ("ratio", "p", "word"),
    [
        (Ratio(1.05, 0.9, 1.2, 0.4), 0.8, "holds"),
        (Ratio(1.05, 0.9, 1.6, 0.4), 0.8, "cannot tell"),  # an interval that is too wide is no agreement
        (Ratio(1.05, 0.6, 1.2, 0.4), 0.8, "cannot tell"),
        (Ratio(1.3, 1.2, 1.4, 0.001), 0.01, "differs"),
        (Ratio(1.3, 1.2, 1.4, 0.04), 0.2, "holds"),
    ],
)
def test_a_level(ratio: Ratio, p: float, word: str) -> None:
    assert level_verdict(ratio, p) == word


SEEN, UNSEEN = 0.01, 0.3
FAR, NEAR, HALF = Ratio(4, 3, 5, 0), Ratio(1.1, 0.9, 1.3, 0), Ratio(0.5, 0.4, 0.6, 0)
VAGUE = Ratio(1.6, 0.9, 2.9, 0)


def turned(ratio: Ratio) -> Ratio:
    return Ratio(1 / ratio.value, 1 / ratio.hi, 1 / ratio.lo, ratio.p_value)


@pytest.mark.parametrize(
    ("plain", "mended", "change", "word"),
    [
        ((FAR, SEEN), (FAR, SEEN), UNSEEN, "holds"),
        ((FAR, UNSEEN), (FAR, SEEN), UNSEEN, "holds"),
        ((FAR, SEEN), (Ratio(1.3, 1.1, 1.6, 0), SEEN), SEEN, "holds, smaller"),  # than the published 3.5
        ((FAR, SEEN), (NEAR, UNSEEN), SEEN, "artefact"),
        ((FAR, SEEN), (HALF, SEEN), SEEN, "artefact"),
        ((FAR, SEEN), (VAGUE, UNSEEN), SEEN, "cannot tell"),  # not seen is no proof that it is not there
        ((FAR, SEEN), (NEAR, UNSEEN), UNSEEN, "cannot tell"),
        ((FAR, UNSEEN), (NEAR, UNSEEN), SEEN, "cannot tell"),
        ((FAR, SEEN), (HALF, SEEN), UNSEEN, "reversed"),
        ((HALF, SEEN), (HALF, SEEN), UNSEEN, "reversed"),
        ((NEAR, UNSEEN), (HALF, SEEN), UNSEEN, "reversed"),
        ((HALF, SEEN), (NEAR, UNSEEN), UNSEEN, "cannot tell"),
    ],
)
def test_a_claim(plain: tuple[Ratio, float], mended: tuple[Ratio, float], change: float, word: str) -> None:
    assert Comparison(3.5, *plain, *mended, change).verdict == word
    other = [(turned(ratio), p) for ratio, p in (plain, mended)]
    assert Comparison(1 / 3.5, *other[0], *other[1], change).verdict == word  # the same, told from the other side


@pytest.mark.parametrize(
    ("published", "change", "word"),
    [
        (0.40, SEEN, "artefact"),
        (0.40, UNSEEN, "cannot tell"),
        (0.02, SEEN, "holds"),
        (0.02, UNSEEN, "holds"),
        (0.016, UNSEEN, "cannot tell"),  # in the interval, which reaches to more than half as much again
        (0.90, SEEN, "cannot tell"),  # by neither
    ],
)
def test_a_number(published: float, change: float, word: str) -> None:
    assert number_verdict(published, Estimate(0.37, 0.3, 0.45, 3), Estimate(0.02, 0.015, 0.025, 3), change) == word


def test_a_wide_interval_agrees_with_nothing() -> None:
    wide, narrow = Estimate(0.4, 0.1, 0.9, 3), Estimate(0.02, 0.01, 0.03, 3)
    assert number_verdict(0.4, wide, narrow, SEEN) == "cannot tell"
    assert number_verdict(0.4, narrow, wide, SEEN) == "cannot tell"
    assert number_verdict(0.4, Estimate(0.37, 0.3, 0.45, 3), wide, SEEN) == "cannot tell"


def test_published_numbers_are_read_as_they_stand() -> None:
    assert said(".008062 ± .0074") == Published(0.008062, 0.0074, 3)
    assert written_sd(Published(0.0033684, 0.0000391)) == ".003368 ± .000039"


def test_ratios_in_words() -> None:
    assert str(Ratio(0.987, 0.0123, 123.4, 0.5)) == ".99 (.012 to 123)"
    assert [rounded(x) for x in (1.0, 9.96, 10.4, -0.5)] == ["1.0", "10", "10", "-.50"]
    assert percent(Ratio(1.08, 0.77, 1.4, 0.5)) == "+8 % (-23 to +40)"
    assert [p_words(p) for p in (1.0, 0.5, 0.00012)] == ["1", ".5", ".00012"]
