import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from lightning_toys.stats import geometric_ci, holm, mean_ci, paired_difference, paired_ratio, share_ci
from lightning_toys.training.noise import keyed_generator

X = [0.3, 1.7, -0.4, 2.2, 0.9, 5.0]


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_interval_is_scipys(level: float) -> None:
    estimate = mean_ci(X, level)
    lo, hi = scipy_stats.t.interval(level, len(X) - 1, loc=np.mean(X), scale=scipy_stats.sem(X))
    assert estimate.mean == pytest.approx(np.mean(X), rel=1e-14)
    assert (estimate.lo, estimate.hi, estimate.n) == (pytest.approx(lo, rel=1e-12), pytest.approx(hi, rel=1e-12), 6)
    assert estimate.half_width == pytest.approx((hi - lo) / 2, rel=1e-12)


def test_interval_of_two_values_by_hand() -> None:
    estimate = mean_ci([1.0, 3.0])  # s / sqrt(n) = 1; t_.975 with one degree of freedom is tan(.475 pi)
    assert estimate.half_width == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)


def test_level_is_95_percent_by_default() -> None:
    assert mean_ci(X) == mean_ci(X, 0.95)


def test_one_value_has_no_interval() -> None:
    estimate = mean_ci([2.5])
    assert (estimate.mean, estimate.n) == (2.5, 1)
    assert math.isnan(estimate.lo)
    assert math.isnan(estimate.hi)
    assert math.isnan(estimate.half_width)


def test_no_value_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_ci([])


def covered(half_widths: np.ndarray, means: np.ndarray, truth: float) -> float:
    return float((np.abs(means - truth) <= half_widths).mean())


def test_coverage() -> None:
    """5 Gaussians of mean 2: the interval covers 2 in 95 % of 2000 cases within 5 SE; a normal quantile does not."""
    rows = keyed_generator(0, 0, "test/coverage").normal(2, 3, (2000, 5))
    estimates = [mean_ci(row) for row in rows]
    means, halves = np.array([e.mean for e in estimates]), np.array([e.half_width for e in estimates])
    five_se = 5 * math.sqrt(0.95 * 0.05 / 2000)
    assert abs(covered(halves, means, 2) - 0.95) < five_se
    normal = halves * scipy_stats.norm.ppf(0.975) / scipy_stats.t.ppf(0.975, 4)
    assert abs(covered(normal, means, 2) - 0.95) > five_se


def test_paired_difference_is_scipys() -> None:
    g = keyed_generator(1, 0, "test/paired")
    a, b = g.normal(1, 1, 8), g.normal(0.2, 1, 8)
    found = paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    expected = scipy_stats.ttest_rel(a, b)
    assert found is not None
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-10)
    ci = expected.confidence_interval(0.95)
    assert (found.estimate.lo, found.estimate.hi) == (pytest.approx(ci.low), pytest.approx(ci.high))
    assert found.estimate.mean == pytest.approx((a - b).mean())


def test_differences_that_are_one_number_up_to_rounding() -> None:
    """No warning of lost precision, and the p-value of an exactly constant difference."""
    a, b = {0: 0.0, 1: 0.0}, {0: 0.05, 1: float(np.nextafter(0.05, 0))}
    found, exact = paired_difference(a, b), paired_difference(a, {0: 0.05, 1: 0.05})
    assert found is not None
    assert exact is not None
    assert found.p_value == exact.p_value
    assert found.estimate.mean == pytest.approx(-0.05)


def test_paired_difference_pairs_by_seed() -> None:
    a, b = {7: 1.0, 3: 2.0, 5: 4.0, 9: 100.0}, {3: 1.0, 5: 2.0, 7: 0.5, 8: -100.0}
    found = paired_difference(a, b)
    expected = scipy_stats.ttest_rel([2.0, 4.0, 1.0], [1.0, 2.0, 0.5])
    assert found is not None
    assert (found.estimate.n, found.estimate.mean) == (3, pytest.approx(3.5 / 3))
    assert found.p_value == pytest.approx(expected.pvalue)
    swapped = paired_difference(b, a)
    assert swapped is not None
    assert swapped.estimate.mean == pytest.approx(-found.estimate.mean)


def test_paired_difference_needs_two_shared_seeds() -> None:
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 1.0, 2: 2.0}) is None
    assert paired_difference({}, {}) is None
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 1.0, 0: 3.0}) is not None


def test_paired_difference_without_spread() -> None:
    same = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    shifted = paired_difference({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0})
    assert same is not None
    assert shifted is not None
    assert (same.p_value, shifted.p_value) == (1.0, 0.0)
    assert shifted.estimate.half_width == 0


def test_holm_by_hand() -> None:
    # sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, the last raised to .06
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02], rtol=1e-14)


def test_holm_is_capped_and_between_raw_and_bonferroni() -> None:
    np.testing.assert_allclose(holm([0.6, 0.9]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.2]), [0.2])
    assert holm([]).shape == (0,)
    p = keyed_generator(2, 0, "test/holm").random(20) ** 3
    adjusted = holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, 20 * p)).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_holm_keeps_the_familywise_error() -> None:
    """Of 2000 families of 10 true nulls at most 5 % + 5 SE have a rejection; raw p-values reject in 40 % of them."""
    families = keyed_generator(3, 0, "test/familywise").random((2000, 10))
    five_se = 5 * math.sqrt(0.05 * 0.95 / 2000)
    assert np.mean([holm(p).min() < 0.05 for p in families]) < 0.05 + five_se
    assert np.mean(families.min(1) < 0.05) > 0.05 + five_se


def test_paired_ratio_is_scipys_test_of_the_logarithms() -> None:
    rng = np.random.default_rng(4)
    a, b = (dict(enumerate(rng.lognormal(mean, 0.7, 8))) for mean in (1.0, 0.2))
    found, other = paired_ratio(a, b), paired_ratio(b, a)
    assert found is not None
    assert other is not None
    logs = np.log([a[s] / b[s] for s in range(8)])
    wanted = scipy_stats.ttest_1samp(logs, 0.0)
    ends = wanted.confidence_interval(0.95)
    assert found.p_value == pytest.approx(wanted.pvalue, rel=1e-12)
    assert found.estimate.mean == pytest.approx(np.exp(logs.mean()), rel=1e-12)
    assert (found.estimate.lo, found.estimate.hi) == pytest.approx((np.exp(ends.low), np.exp(ends.high)), rel=1e-12)
    assert other.estimate.mean == pytest.approx(1 / found.estimate.mean, rel=1e-12)
    assert other.estimate.hi == pytest.approx(1 / found.estimate.lo, rel=1e-12)
    scaled = paired_ratio({s: 1e-9 * v for s, v in a.items()}, {s: 1e-9 * v for s, v in b.items()})
    assert scaled is not None
    assert scaled.estimate.mean == pytest.approx(found.estimate.mean, rel=1e-9)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        assert paired_ratio(a | {3: wrong}, b) is None
        assert paired_ratio({k: v for k, v in a.items() if k != 3} | {9: wrong}, b) is not None  # not shared
    assert paired_ratio({0: 1.0}, {0: 2.0}) is None


def test_geometric_interval_is_that_of_the_logarithm() -> None:
    x = [0.01, 0.03, 0.011, 0.5]
    logs = mean_ci(np.log(x))
    found = geometric_ci(x)
    assert found is not None
    np.testing.assert_allclose([found.mean, found.lo, found.hi], np.exp([logs.mean, logs.lo, logs.hi]))
    assert found.lo > 0 > mean_ci(x).lo  # where the arithmetic interval goes below 0
    for wrong in ([1.0, 0.0], [1.0, -1.0], [1.0, np.nan], [1.0, np.inf]):
        assert geometric_ci(wrong) is None
    alone = geometric_ci([4.0])
    assert alone is not None
    assert (alone.mean, np.isnan(alone.lo)) == (pytest.approx(4.0), True)


def test_intervals_of_shares_lie_within_the_unit_interval() -> None:
    """Wilson's of yes and no, by its formula; Student's of logits of shares, which near one half is Student's."""
    k, n, z = 3, 20, 1.959964
    centre, half = (k + z**2 / 2) / (n + z**2), z * math.sqrt(k * (n - k) / n + z**2 / 4) / (n + z**2)
    found = share_ci([1.0] * k + [0.0] * (n - k), 1)
    assert (found.mean, found.lo, found.hi) == pytest.approx((0.15, centre - half, centre + half))
    none = share_ci([0.0] * 8, 1)
    assert none.lo == pytest.approx(0, abs=1e-12)
    assert none.hi == pytest.approx(z**2 / (8 + z**2))
    values = [0.47, 0.5, 0.52]
    plain, found = mean_ci(values), share_ci(values, 10_000)
    assert (found.lo, found.hi) == pytest.approx((plain.lo, plain.hi), abs=2e-3)
    small = [0.0, 0.0002, 0.0001]
    assert mean_ci(small).lo < 0 < share_ci(small, 10_000).lo < share_ci(small, 10_000).hi < 0.01
    assert math.isnan(share_ci([0.3], 100).lo)
    with pytest.raises(ValueError, match="at least one value"):
        share_ci([], 100)


def test_the_interval_of_shares_is_that_of_their_mean() -> None:
    """It holds the mean whatever the shares; one replica of eight that differs does not leave it; 0 has a width."""
    g = keyed_generator(0, 0, "test/shares")
    for i in range(300):
        n, count = int(g.integers(2, 10)), float([1, 7, 200, 20_000, math.inf][i % 5])
        x = g.beta(0.1, 0.3, n)
        if math.isfinite(count):
            x = np.round(x * count) / count
        if i % 3 == 0:
            x[:] = x[0]
        found = share_ci(x, count)
        assert 0 <= found.lo <= found.mean <= found.hi <= 1, (x, count)
        assert found.hi > found.lo or math.isinf(count) or x.std() > 0 or found.mean in (0, 1)
    one = share_ci([0.0] * 7 + [0.5], 20_000)
    half = 2.364624 * 0.0625 / (0.0625 * 0.9375)  # t with 7 degrees of freedom
    ends = [1 / (1 + 15 * math.exp(sign * half)) for sign in (1, -1)]
    assert (one.lo, one.hi) == pytest.approx(ends, rel=1e-3)


def test_shares_that_agree_are_as_certain_as_their_samples() -> None:
    """8 x 20 000 samples: Wilson's interval where all agree, its width the least where they nearly do."""
    z, total = 1.959964, 160_000
    for p in (0.0, 0.1):
        found, k = share_ci([p] * 8, 20_000), p * total
        centre, half = (k + z**2 / 2) / (total + z**2), z * math.sqrt(k * (1 - p) + z**2 / 4) / (total + z**2)
        assert (found.lo, found.hi) == pytest.approx((centre - half, centre + half), abs=1e-9)
        assert found.hi > found.lo
    near = share_ci([0.1] * 7 + [0.1 + 1 / 20_000], 20_000)
    assert near.hi - near.lo == pytest.approx(2 * 2.364624 * math.sqrt(0.09 / total), rel=1e-3)
    total_variation = share_ci([0.1] * 7 + [0.10001], math.inf)  # no share of samples: the spread alone
    assert 0 < total_variation.hi - total_variation.lo < 1e-5
    assert share_ci([0.2, 0.2], math.inf).hi == 0.2
