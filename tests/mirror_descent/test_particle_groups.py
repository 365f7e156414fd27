"""Verdicts on particles whose groups differ: the bias is bounded, skewed means are not tested."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lightning_toys.mirror_descent.closed_form_checks import closed_form_checks, judge
from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample, standard_error
from lightning_toys.mirror_descent.joint import LinearGaussianJoint
from lightning_toys.mirror_descent.particle_groups import group_estimates, limit_bias, too_skewed
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.samplers import Importance, z_check
from lightning_toys.mirror_descent.schedules import Linear
from lightning_toys.mirror_descent.tilt import StateReward

PROBLEM = Problem(LinearGaussianJoint(), StateReward(), Linear(), 1.5, Settings())


def log_z_of(values: Any) -> list[Sample]:
    """Return samples whose groups estimate Z by these values times the exact one."""
    found = [math.log(v) + PROBLEM.tilted.log_z for v in values]
    return [Sample(np.zeros(1), np.zeros(1), extra={"log_z": half}) for half in (found[::2], found[1::2])]


@pytest.mark.parametrize("spread", [0.05, 0.8])
def test_the_bias_of_groups_is_at_most_the_bound(spread: float) -> None:
    """E f_g - E f = -Cov(Z_g / Z, f_g): where f_g is a line of Z_g it is the bound, to the last digit."""
    z = np.tile([1 - spread, 1 + spread], 32)
    f = 2.0 - 3.0 * (z - 1)
    exact = float((z * f).sum() / z.sum())  # E f
    se = float(f.std() / math.sqrt(len(f)))
    assert abs(f.mean() - exact) == pytest.approx(limit_bias(z) * se)
    check = ClosedFormCheck("fk", "mean", exact, "limit", exact, float(f.mean()), se, len(f), limit_bias(z) * se)
    assert check.z == pytest.approx(0.0, abs=1e-9)
    assert abs(check.goal_z) == pytest.approx(limit_bias(z))  # the goal is missed all the same
    off = replace(check, estimate=check.estimate + 5 * se)
    assert off.z == pytest.approx(5.0)
    assert replace(off, bias=0.0).z == pytest.approx(5.0 + limit_bias(z))
    assert judge([off])[0].detectable == pytest.approx(judge([replace(off, bias=0.0)])[0].detectable + check.bias)


def test_group_estimates_are_relative_to_z() -> None:
    """All groups of all seeds, divided by the exact Z or by their greatest."""
    samples = log_z_of([0.5, 2.0, 1.0, 1.0])
    np.testing.assert_allclose(sorted(group_estimates(samples, PROBLEM.tilted.log_z)), [0.5, 1.0, 1.0, 2.0])
    np.testing.assert_allclose(sorted(group_estimates(samples)), [0.25, 0.5, 0.5, 1.0])
    assert group_estimates([Sample(np.zeros(1), np.zeros(1))]).shape == (0,)


def test_rare_large_estimates_of_z_are_missed_more_easily_than_met_too_often() -> None:
    """Of right estimates that are rarely large many sets have too small a mean: no error. Too large a mean is."""
    values = np.exp(np.random.default_rng(0).normal(-3.125, 2.5, (400, 128)))  # of mean 1
    t = np.array([(v.mean() - 1) / standard_error(v) for v in values])
    assert (t < -4).mean() > 0.1  # a t-test would call these wrong
    assert (t > 4).sum() == 0
    checks = [z_check(Importance(PROBLEM), log_z_of(v)) for v in values]
    assert all(too_skewed(v) for v in values)
    assert {c.source for c, x in zip(checks, t, strict=True) if x < 0} == {"skewed"}
    tested = [c.z for c in checks if not math.isnan(c.z)]
    assert 0 < len(tested) < 200
    assert max(map(abs, tested)) < 4


def test_z_too_large_differs_however_skewed() -> None:
    """Estimates a thousand times too large are wrong, skewed or not; even ones that are off by 2 % are, too."""
    values = 1000 * np.exp(np.random.default_rng(0).normal(-1.28, 1.6, 128))
    assert too_skewed(values)
    assert z_check(Importance(PROBLEM), log_z_of(values)).z > 5
    even = 0.98 + 0.01 * np.random.default_rng(0).normal(size=128)
    assert z_check(Importance(PROBLEM), log_z_of(even)).z < -10


def test_importance_weights_keep_their_power() -> None:
    """With even groups the bound is small beside an error: what is taken off is a fraction of one standard error."""
    rng = np.random.default_rng(0)
    a, s = rng.normal(size=(2, 8192))
    extra = {"log_z": (PROBLEM.tilted.log_z + 0.01 * rng.normal(size=2)).tolist(), "ess_fraction": [0.4, 0.4]}
    checks = closed_form_checks(Importance(PROBLEM), [Sample(a, s, extra=extra)] * 4)
    limits = [c for c in checks if c.source == "limit"]
    assert len(limits) == 4
    assert all(0 < c.bias < 0.1 * c.standard_error for c in limits)


def test_few_even_values_are_tested() -> None:
    """The skewness of four normal values is chance: they are tested nearly always, a single large one in ten is not."""
    rng = np.random.default_rng(0)
    for n in (4, 8, 32):
        assert np.mean([too_skewed(1 + 0.1 * rng.normal(size=n)) for _ in range(500)]) < 0.05
    assert too_skewed(np.array([1.0] * 9 + [5.0]))


def test_astronomical_estimates_differ() -> None:
    """Estimates of Z that are off by thousands of nats are numbers still, and wrong ones: never "not tested"."""
    found = np.array([5000.0, 5001.0, 5002.0, 5000.5]) + PROBLEM.tilted.log_z
    large = z_check(Importance(PROBLEM), [Sample(np.zeros(1), np.zeros(1), extra={"log_z": found.tolist()})])
    assert large.z > 5
    found = np.random.default_rng(0).normal(150.0, 3.0, 64) + PROBLEM.tilted.log_z
    spread = z_check(Importance(PROBLEM), [Sample(np.zeros(1), np.zeros(1), extra={"log_z": found.tolist()})])
    assert math.isfinite(spread.z)
    assert spread.z > 0
    small = z_check(Importance(PROBLEM), [Sample(np.zeros(1), np.zeros(1), extra={"log_z": [-9000.0] * 4})])
    assert small.z < -5
