"""Verdicts on published numbers: the statistics are scipy's, and the words follow from them by a rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from gallery.verdicts import (
    NEAR,
    Comparison,
    Level,
    Ratio,
    claim_verdict,
    claim_verdicts,
    geometric_mean,
    levels,
    logs,
    p_words,
    paired_ratio,
    rounded,
    welch_ratio,
)

A, B = [0.31, 0.52, 0.47, 0.88], [0.11, 0.16, 0.12]


def test_the_ratio_is_welch_s_test_of_logarithms() -> None:
    found = welch_ratio(A, B)
    wanted = scipy_stats.ttest_ind(np.log(A), np.log(B), equal_var=False)
    interval = wanted.confidence_interval()
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-10)
    assert found.value == pytest.approx(scipy_stats.gmean(A) / scipy_stats.gmean(B), rel=1e-12)
    assert found.ends == pytest.approx((math.exp(interval.low), math.exp(interval.high)), rel=1e-10)
    assert found.p_value != pytest.approx(scipy_stats.ttest_ind(A, B, equal_var=False).pvalue, rel=0.05)
    assert found.p_value != pytest.approx(scipy_stats.ttest_ind(np.log(A), np.log(B)).pvalue, rel=0.05)
    # a population's deviation would be another test
    wrong = np.log(A).std() ** 2 / 4 + np.log(B).std() ** 2 / 3
    assert found.error != pytest.approx(math.sqrt(wrong), rel=0.05)
    turned = welch_ratio(B, A)
    assert (turned.log, turned.p_value) == pytest.approx((-found.log, found.p_value))


def test_equivalence_is_two_one_sided_tests() -> None:
    a, b = [0.31, 0.33, 0.30], [0.29, 0.30, 0.31]
    found, bound = welch_ratio(a, b), math.log(NEAR)
    sides = [
        scipy_stats.ttest_ind(np.log(a), np.log(b) + shift, equal_var=False, alternative=side).pvalue
        for shift, side in ((-bound, "greater"), (bound, "less"))
    ]
    assert found.p_near == pytest.approx(max(sides), rel=1e-10)
    assert found.p_not_above == pytest.approx(sides[1], rel=1e-10)
    assert found.p_near < 0.01
    assert welch_ratio(A, B).p_near > 0.9
    assert welch_ratio([x * 1.49 for x in b], b).p_near > 0.4  # within the factor, and not surely
    assert welch_ratio([x / 3 for x in b], b).p_not_above < 0.01  # smaller is not above, and is not near
    assert welch_ratio([x / 3 for x in b], b).p_near > 0.9
    # two one-sided tests at 5 %: the 90 % interval within the factor
    half = scipy_stats.t.ppf(0.95, found.dof) * found.error
    inside = found.log - half > -bound and found.log + half < bound
    assert bool(inside) is (found.p_near < 0.05) is True


def test_the_paired_ratio_is_a_paired_t_test_of_logarithms() -> None:
    a, b = {3: 0.2, 1: 0.5, 2: 0.9}, {1: 0.1, 2: 0.3, 3: 0.02, 9: 1.0}
    found = paired_ratio(a, b)
    seeds = (1, 2, 3)
    wanted = scipy_stats.ttest_rel([math.log(a[s]) for s in seeds], [math.log(b[s]) for s in seeds])
    interval = wanted.confidence_interval()
    assert found.value == pytest.approx((5 * 3 * 10) ** (1 / 3), rel=1e-12)
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-10)
    assert found.ends == pytest.approx((math.exp(interval.low), math.exp(interval.high)), rel=1e-10)
    with pytest.raises(ValueError, match="two positive values"):
        paired_ratio({1: 1.0}, b)


def test_values_that_do_not_vary() -> None:
    same = paired_ratio({1: 0.3, 2: 0.4}, {1: 0.3, 2: 0.4})
    assert (same.p_value, same.p_near) == (1, 0)
    double = Ratio(math.log(2), 0, 2)
    assert (double.p_value, double.p_near, double.p_not_above) == (0, 1, 1)
    assert Ratio(-math.log(2), 0, 2).p_not_above == 0


def test_logarithms_want_positive_values() -> None:
    assert geometric_mean([1, 4]) == pytest.approx(2)
    for values in ([0.1, 0.0], [0.1, -0.2], [0.1], []):
        with pytest.raises(ValueError, match="two positive values"):
            logs(values)


# levels

SURE = 0.01


def ratio(value: float, error: float, dof: float = 4) -> Ratio:
    return Ratio(math.log(value), error, dof)


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (ratio(1.05, 0.03), "reproduced"),
        (ratio(1.05, 0.3), "cannot tell"),  # nothing is seen, and that is no agreement
        (ratio(0.5, 0.05), "differs"),
        (ratio(2.0, 0.05), "differs"),
        (ratio(1.2, 0.02), "differs, within 1.5"),
        (ratio(1.4, 0.5), "cannot tell"),
    ],
)
def test_a_level(found: Ratio, word: str) -> None:
    assert levels([found])[0].verdict == word
    turned = Ratio(-found.log, found.error, found.dof)
    assert levels([turned])[0].verdict == word


def test_levels_are_adjusted_over_their_family() -> None:
    one = ratio(1.3, 0.065)  # p = .016 alone
    assert levels([one])[0].p_value == pytest.approx(one.p_value)
    assert levels([one])[0].verdict.startswith("differs")
    twenty = levels([one] + [ratio(1.0, 0.3)] * 19)
    assert twenty[0].p_value == pytest.approx(20 * one.p_value)
    assert twenty[0].p_near == pytest.approx(min(1, 20 * one.p_near))
    assert twenty[0].verdict == "cannot tell"
    assert Level(one, 0.5, 0.01).verdict == "reproduced"


# claims

FAR, NONE, WORSE, VAGUE = ratio(0.2, 0.05), ratio(1.02, 0.03), ratio(2.0, 0.05), ratio(0.8, 0.6)
MOVED, STILL = ratio(5, 0.05), ratio(1.0, 0.05)


def turned(found: Ratio) -> Ratio:
    return Ratio(-found.log, found.error, found.dof)


def comparison(plain: Ratio, mended: Ratio, change: Ratio, **alone: float) -> Comparison:
    return Comparison(plain, mended, change, alone)


@pytest.mark.parametrize(
    ("plain", "mended", "change", "word", "tie_word"),
    [
        (FAR, FAR, STILL, "holds", "holds"),
        (VAGUE, FAR, STILL, "holds", "holds"),
        (FAR, NONE, MOVED, "artefact", "holds"),  # of "matches or exceeds" a tie is enough
        (FAR, WORSE, MOVED, "artefact", "artefact"),
        (FAR, NONE, STILL, "cannot tell", "holds"),  # it is not mending that changes it
        (FAR, VAGUE, MOVED, "cannot tell", "cannot tell"),  # not seen is no proof that it is not there
        (VAGUE, NONE, MOVED, "cannot tell", "holds"),
        (FAR, WORSE, STILL, "reversed", "reversed"),
        (WORSE, WORSE, STILL, "reversed", "reversed"),
        (NONE, WORSE, MOVED, "reversed", "artefact"),  # the published protocol shows a tie, no difference
        (WORSE, VAGUE, STILL, "cannot tell", "cannot tell"),
        (VAGUE, VAGUE, MOVED, "cannot tell", "cannot tell"),
    ],
)
def test_a_comparison(plain: Ratio, mended: Ratio, change: Ratio, word: str, tie_word: str) -> None:
    c = comparison(plain, mended, change)
    assert claim_verdicts([c]) == [word]
    assert claim_verdicts([c], ties_hold=True) == [tie_word]


def test_which_side_is_the_claim_s() -> None:
    """A / B below 1 is the claim: the same numbers the other way round are its reverse."""
    c = comparison(turned(FAR), turned(FAR), STILL)
    assert claim_verdicts([c]) == ["reversed"]
    assert claim_verdicts([c], ties_hold=True) == ["reversed"]


def test_comparisons_are_adjusted_over_their_claim() -> None:
    weak = ratio(0.75, 0.075)  # p = .02 alone
    assert claim_verdicts([comparison(weak, weak, STILL)]) == ["holds"]
    many = claim_verdicts([comparison(weak, weak, STILL)] + [comparison(VAGUE, VAGUE, STILL)] * 11)
    assert set(many) == {"cannot tell"}


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        (["holds", "holds"], "holds"),
        (["holds", "cannot tell"], "cannot tell"),
        (["cannot tell"], "cannot tell"),
        (["holds", "holds", "reversed"], "reversed"),
        (["artefact", "reversed"], "reversed"),
        (["holds", "artefact", "cannot tell"], "artefact of x0"),
        ([], "cannot tell"),
    ],
)
def test_a_claim(words: list[str], verdict: str) -> None:
    causes = [["x0"] if w == "artefact" else ["steps"] for w in words]
    assert claim_verdict(words, causes) == verdict


def test_causes() -> None:
    change = Ratio(math.log(8), 0.1, 2)
    log = math.log
    assert Comparison(FAR, NONE, change, {"x0": log(7), "steps": log(1.2)}).causes == ["x0"]
    assert Comparison(FAR, NONE, change, {"x0": log(4), "steps": log(3)}).causes == ["x0", "steps"]
    assert Comparison(FAR, NONE, change, {"x0": -log(8), "steps": log(2)}).causes == ["all of it together"]
    down = Ratio(-log(8), 0.1, 2)
    assert Comparison(FAR, NONE, down, {"x0": -log(7), "steps": log(8)}).causes == ["x0"]
    words, causes = ["artefact", "artefact", "artefact", "holds"], [["x0"], ["x0", "f*"], ["steps"], ["weights"]]
    assert claim_verdict(words, causes) == "artefact of x0"
    assert claim_verdict(["artefact", "artefact"], [["x0"], ["steps"]]) == "artefact of x0 and steps"


def test_ratios_in_words() -> None:
    assert str(Ratio(math.log(0.987), 0.0, 2)) == ".99 (.99 to .99)"
    assert [rounded(x) for x in (1.0, 9.96, 10.4, 0.0123, 123.4, 1.3e6)] == [
        "1.0",
        "10",
        "10",
        ".012",
        "123",
        "1.3e+06",
    ]
    assert [p_words(p) for p in (1.0, 0.5, 0.00012)] == ["1", ".5", ".00012"]
