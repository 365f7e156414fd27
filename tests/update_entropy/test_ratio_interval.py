"""The interval of a ratio of two estimates, of which either may be noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.update_entropy.estimators import Estimate, ratio_interval


def two_means(x: Tensor, y: Tensor) -> tuple[Estimate, Estimate]:
    """The means of two columns (N,), a draw each, with the draws' influences."""
    index, n = torch.arange(len(x)), len(x)
    a, b = (Estimate.from_influence(v.mean(), v / n, (v - v.mean()) / n, index) for v in (x, y))
    return a, b


def test_the_interval_of_a_ratio_covers_it() -> None:
    """Fieller's interval, of correlated estimates of which one is three of its errors from 0."""
    rng, n, rounds, hits, short = np.random.default_rng(0), 24, 3000, 0, 0
    mean, cov = np.array([1.0, -0.6]), np.array([[1.0, 0.7], [0.7, 1.0]])
    for x in torch.from_numpy(rng.multivariate_normal(mean, cov, (rounds, n))):
        found = ratio_interval(*two_means(x[:, 0], x[:, 1]), torch.arange(n))
        assert found is not None
        hits += found[0] <= 1 / 0.6 <= found[1]
        short += found[1] < 100
    assert hits / rounds == pytest.approx(0.95, abs=0.012)
    assert short / rounds > 0.7  # it does not cover by being endless


@pytest.mark.parametrize("case", ["both", "first is noise", "second is noise", "neither", "second is exact"])
def test_the_interval_of_a_ratio_is_the_set_of_those_that_are_not_rejected(case: str) -> None:
    g = torch.Generator().manual_seed(4)
    x, y = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(2))
    x, y = x - x.mean(), 0.5 * x + y - y.mean()
    x = x + {"first is noise": 0.1, "neither": -0.2}.get(case, 3.0)
    y = y + {"second is noise": 0.1, "neither": 0.1}.get(case, -2.0)
    y = torch.full_like(y, -2.0) if case == "second is exact" else y
    a, b = two_means(x, y)
    found = ratio_interval(a, b, torch.arange(20))
    assert found is not None
    r = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    d = x.unsqueeze(1) - r * y.unsqueeze(1)
    kept = r[(d.mean(0) / (d.std(0) / 20**0.5)).abs() <= 2.093024]  # Student's t, 19 degrees of freedom
    low, high = float(kept.abs().min()), float(kept.abs().max())
    assert found[0] == pytest.approx(low, abs=1e-3)
    if high > 59:
        assert found[1] == float("inf")
    else:
        assert found[1] == pytest.approx(high, abs=1e-3)
    assert (found[0] == 0) == (case in ("first is noise", "neither"))
    assert (found[1] == float("inf")) == (case in ("second is noise", "neither"))
    if case == "second is exact":
        assert found == pytest.approx(((abs(a.value) - 2.093024 * a.se) / 2, (abs(a.value) + 2.093024 * a.se) / 2))


def test_one_prompt_gives_no_interval() -> None:
    a, b = two_means(torch.ones(3).double(), torch.ones(3).double())
    assert ratio_interval(a, b, torch.zeros(3, dtype=torch.long)) is None
