"""The control without a network, and the drift whose period changes: against other definitions of the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import yaml

from lightning_toys.bilevel.regression.algorithms import LeastSquares, TimeStep
from lightning_toys.bilevel.regression.data import DriftStream
from lightning_toys.bilevel.regression.drift import Drift, EmpiricalLoss, Sine, SwitchingSine, simplex_minimum
from lightning_toys.bilevel.regression.hypergradients import Window
from lightning_toys.bilevel.regression.mlp import MLP
from lightning_toys.errors import ToyError
from tests.bilevel.regression.test_controls import no_moments
from tests.conftest import REPO

LIKE = torch.zeros(1, dtype=torch.float64)


def weights_over_time(data: DriftStream, steps: int) -> list[np.ndarray]:
    """What the control gives at each step, (R, W)."""
    stream, method, net = data.stream([0, 3]), LeastSquares(), MLP((5, 3))
    sizes = {"window": data.window, "outputs": 3} | method.measure(data)
    memory = {k: v.double() for k, v in method.memory(net, [0, 3], sizes).items()}
    out = []
    for t in range(steps):
        window = Window(*stream.points(LIKE), *stream.window(t, data.window, LIKE))
        lam = torch.full((2, data.window), 0.5, dtype=torch.float64)
        found = method.weights_at(TimeStep(net, lam, lam, window, no_moments, 0.1, memory))
        assert found is not None
        out.append(found.numpy())
    return out


def test_it_is_the_best_of_what_was_observed() -> None:
    """At step t the minimum of the observed loss over the times up to t - 1, of each replica's inner points."""
    data = DriftStream(4, Sine(3, 0.9), inner_points=6, outer_points=5)
    found, stream = weights_over_time(data, 9), data.stream([0, 3])
    assert found[0].tolist() == [[1] * 4] * 2
    for t in range(1, 9):
        y = stream.observations(-4, t, LIKE)[:, :, :6].numpy()
        for r in range(2):
            np.testing.assert_allclose(found[t][r], EmpiricalLoss(y[r], 4).oracle(), atol=1e-9)
    assert np.abs(found[8][0] - found[8][1]).max() > 1e-3


def test_it_finds_a_period() -> None:
    data = DriftStream(7, Sine(10, 2 * math.pi / 5), noise=0.1, inner_points=6, outer_points=5)
    found = weights_over_time(data, 12)[-1]
    assert found[:, 4].min() > 0.99  # lag 5


def test_the_minimum_on_the_simplex() -> None:
    """Its conditions: Q w is constant where w > 0, and no less elsewhere."""
    rng = np.random.default_rng(1)
    clipped = 0
    for _ in range(20):
        a = rng.normal(size=(6, 6))
        form = a.T @ a
        w = simplex_minimum(form)
        slope = form @ w
        assert w.min() >= 0
        assert w.sum() == pytest.approx(1)
        np.testing.assert_allclose(slope[w > 0], slope @ w, rtol=1e-6)
        assert (slope >= slope @ w - 1e-9).all()
        clipped += int((w == 0).any())
    assert clipped > 5


def test_a_phase_has_no_jumps() -> None:
    drift = SwitchingSine(2.0, (0.2, 0.5, 0.1), 7)
    t = np.arange(-50, 50)
    turned = np.diff(drift.phase(t))
    np.testing.assert_allclose(turned, np.array([0.2, 0.5, 0.1])[(t[:-1] // 7) % 3], atol=1e-12)
    assert drift.phase(np.array(0)) == 0
    assert drift.mean(t.reshape(10, 10)).shape == (10, 10)
    np.testing.assert_allclose(drift.mean(t), 2 * np.sin(drift.phase(t)))


def test_moments_of_a_changing_period() -> None:
    """Against the sine's where there is one angle, and against the mean over many times."""
    one, sine = SwitchingSine(10, (0.2,), 50), Sine(10, 0.2)
    np.testing.assert_allclose(one.mean(np.arange(-90, 90)), sine.mean(np.arange(-90, 90)), atol=1e-9)
    np.testing.assert_allclose(one.lag_moments(12), sine.lag_moments(12), atol=1e-9)
    assert one.power == sine.power
    drift = SwitchingSine(1.0, (0.21, 0.37), 25)
    closed, estimated = drift.lag_moments(30), Drift.lag_moments(drift, 30)
    np.testing.assert_allclose(closed, estimated, atol=0.02 * drift.power)
    np.testing.assert_allclose(closed, closed.T)
    assert np.abs(closed - SwitchingSine(1.0, (0.21,), 25).lag_moments(30)).max() > 0.2


def test_a_changing_period_that_is_none() -> None:
    for omegas, says in (((), r"omegas: \(\) is not allowed"), ((0.2, 4.0), "omegas: 4.0"), ((0.0,), "omegas: 0.0")):
        with pytest.raises(ToyError, match=says):
            SwitchingSine(1.0, omegas)
    with pytest.raises(ToyError, match="hold: 0"):
        SwitchingSine(hold=0)


def test_a_last_sixth_is_whole_rounds() -> None:
    """`outer_loss` of the two shipped streams that turn slowly is of every phase and every angle, each as often."""
    found = {
        n: yaml.safe_load((REPO / f"configs/bilevel/regression_{n}.yaml").read_text()) for n in ("slow", "switching")
    }
    drifts = {n: c["data"]["init_args"]["drift"]["init_args"] for n, c in found.items()}
    scored = {n: c["trainer"]["max_steps"] // 6 for n, c in found.items()}
    switching = drifts["switching"]
    assert scored["switching"] >= 1
    assert scored["switching"] % (switching["hold"] * len(switching["omegas"])) == 0
    periods = scored["slow"] * drifts["slow"]["omega"] / (2 * math.pi)
    assert round(periods) >= 1
    assert periods == pytest.approx(round(periods), abs=0.01)
