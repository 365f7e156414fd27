"""Flow maps at the exact flow of a Gaussian: their residuals vanish, or have no correlation with x; jumps are exact.

x0 ~ N(0, 1), x1 ~ N(0, SIGMA^2): x_s has the standard deviation q(s) = sqrt((1 - s)^2 + s^2 SIGMA^2), the flow carries
x to x q(t) / q(s), and its average velocity is x (q(t) / q(s) - 1) / (t - s).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.flow_vs_regression.flow_maps import (
    ConsistencyTraining,
    FlowMap,
    LagrangianFlowMap,
    MeanFlow,
    Shortcut,
    first_rows,
    jump,
)
from lightning_toys.flows import interpolate
from lightning_toys.nets import ConditionalNet, Network

SIGMA, B = 0.3, 200_000


def q(s: Tensor) -> Tensor:
    return ((1 - s) ** 2 + (s * SIGMA) ** 2).sqrt()


class ExactMap(ConditionalNet):
    """The exact average velocity of [c, gap] and s, times a factor that is 1 unless it is to be wrong."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        assert t is not None
        gap = c[..., -1:]
        small = gap.abs() < 1e-9
        safe = torch.where(small, torch.ones_like(gap), gap)
        slope = ((t - 1) + t * SIGMA**2) / q(t) ** 2  # q' / q
        return self.factor * x * torch.where(small, slope, (q(t + safe) / q(t) - 1) / safe)


class ExactEndpoint(ConditionalNet):
    """What makes x + (1 - s) net(x, c, s) the flow's end point."""

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        assert t is not None
        gap = (1 - t).clamp(min=1e-12)
        return x * (SIGMA / q(t) - 1) / gap


def draw(times: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    x0, x1 = (torch.randn(1, B, 1, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.rand(1, B, times, generator=g, dtype=torch.float64)
    return {"c": torch.zeros(1, B, 1, dtype=torch.float64), "x1": SIGMA * x1, "x0": x0, "t": t}


def correlation(residual: Tensor, x: Tensor) -> float:
    """Return the z-score of the mean of residual times x: at the exact solution 0 within errors."""
    product = (residual * x).detach().flatten()
    return float(product.mean() / product.std() * math.sqrt(product.numel()))


def at_start(given: dict[str, Tensor], s: Tensor) -> Tensor:
    return interpolate(given["x0"], given["x1"], s)


def test_meanflow_is_stationary_at_the_exact_map() -> None:
    given = draw(2)
    s, _ = FlowMap().ordered(given["t"])
    x = at_start(given, s)
    (residual,) = MeanFlow(share=1.0).residuals(ExactMap(), **given)
    assert abs(correlation(residual, x)) < 4
    (wrong,) = MeanFlow(share=1.0).residuals(ExactMap(1.1), **given)
    assert abs(correlation(wrong, x)) > 8


def test_meanflow_without_jumps_is_flow_matching() -> None:
    given, net = draw(2), ExactMap()
    s, _ = FlowMap().ordered(given["t"])
    x = at_start(given, s)
    (residual,) = MeanFlow(share=0.0).residuals(net, **given)
    expected = net(x, torch.cat([given["c"], torch.zeros_like(s)], -1), s) - (given["x1"] - given["x0"])
    torch.testing.assert_close(residual, expected)
    assert abs(correlation(residual, x)) < 4


def test_meanflows_derivative_is_that_along_the_path() -> None:
    """By finite differences of a network of random weights, where t stays and x moves with v."""
    g = torch.Generator().manual_seed(0)
    net = Network(hidden=16, layers=2, activation="tanh").build([0], 2, 2, True).double()
    x0, x1 = (torch.randn(1, 6, 2, generator=g, dtype=torch.float64) for _ in range(2))
    c = torch.randn(1, 6, 1, generator=g, dtype=torch.float64)
    t = torch.rand(1, 6, 2, generator=g, dtype=torch.float64)
    (residual,) = MeanFlow(share=1.0).residuals(net, c, x1, x0, t)
    (s, stop), h = FlowMap().ordered(t), 1e-5

    def u(s: Tensor) -> Tensor:
        out: Tensor = net(interpolate(x0, x1, s), torch.cat([c, stop - s], -1), s)
        return out

    target = (x1 - x0) + (stop - s) * (u(s + h) - u(s - h)) / (2 * h)
    torch.testing.assert_close(residual, u(s) - target, rtol=1e-6, atol=1e-8)
    assert (target - (x1 - x0)).abs().max() > 1e-3
    weights = torch.autograd.grad(residual.square().sum(), net.last.weight)[0]  # the target is held fixed
    fixed = torch.autograd.grad((u(s) - target.detach()).square().sum(), net.last.weight)[0]
    torch.testing.assert_close(weights, fixed, rtol=1e-5, atol=1e-8)


def test_two_exact_shortcuts_are_one() -> None:
    """Of the rows that learn jumps, all but those whose halves have the least d, which are Euler steps."""
    given, shortcut = draw(2), Shortcut(share=1.0, steps=8)
    (residual,) = shortcut.residuals(ExactMap(), **given)
    d = 2.0 ** -(1 + (given["t"][..., 1:] * 3).floor())
    assert sorted(set(d.flatten().tolist())) == [0.125, 0.25, 0.5]
    exact = d > 1 / 8
    assert residual[exact].abs().max() < 1e-12
    euler = residual[~exact].abs()
    assert 1e-3 < euler.mean() < 0.1
    (wrong,) = shortcut.residuals(ExactMap(1.1), **given)
    assert wrong[exact].abs().max() > 1e-2


def test_shortcuts_start_on_multiples_and_end_by_one() -> None:
    given, seen = draw(2), []

    class Seeing(ExactMap):
        def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
            assert t is not None
            seen.append((c[..., -1:], t))
            return super().forward(x, c, t)

    Shortcut(share=1.0, steps=8).residuals(Seeing(), **given)
    gap, s = seen[-1]
    assert sorted(set(gap.flatten().tolist())) == [0.25, 0.5, 1.0]
    assert (s / gap).frac().abs().max() == 0
    assert (s + gap).max() == 1
    (plain,) = Shortcut(share=0.0).residuals(ExactMap(), **given)
    s = given["t"][..., :1]
    assert abs(correlation(plain, at_start(given, s))) < 4


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_exact_jumps_follow_the_velocity(stop_gradient: bool) -> None:
    given = draw(2)
    matching, followed = LagrangianFlowMap(stop_gradient).residuals(ExactMap(), **given)
    assert followed.abs().max() < 1e-9
    s = given["t"][..., :1]
    assert abs(correlation(matching, at_start(given, s))) < 4
    net = ExactMap(1.1)
    matching, followed = LagrangianFlowMap(stop_gradient).residuals(net, **given)
    assert abs(correlation(matching, at_start(given, s))) > 8
    assert followed.abs().mean() > 1e-3
    assert torch.autograd.grad(followed.square().mean(), net.factor)[0].abs() > 0  # through the derivative


def test_the_lagrangian_derivative_is_that_of_the_jump() -> None:
    g = torch.Generator().manual_seed(0)
    net = Network(hidden=16, layers=2, activation="tanh").build([0], 2, 2, True).double()
    x0, x1 = (torch.randn(1, 6, 2, generator=g, dtype=torch.float64) for _ in range(2))
    c = torch.randn(1, 6, 1, generator=g, dtype=torch.float64)
    t = torch.rand(1, 6, 2, generator=g, dtype=torch.float64)
    (s, stop), h = FlowMap().ordered(t), 1e-5
    x = interpolate(x0, x1, s)
    _, residual = LagrangianFlowMap().residuals(net, c, x1, x0, t)
    slope = (jump(net, x, c, s, stop + h) - jump(net, x, c, s, stop - h)) / (2 * h)
    end = jump(net, x, c, s, stop)
    there = net(end, torch.cat([c, torch.zeros_like(c)], -1), stop)
    torch.testing.assert_close(residual, slope - there, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("nfe", [1, 2, 5])
@pytest.mark.parametrize("objective", [MeanFlow(), Shortcut(), LagrangianFlowMap()], ids=lambda o: type(o).__name__)
def test_jumps_of_the_exact_map_end_where_the_flow_does(objective: FlowMap, nfe: int) -> None:
    given = draw(2)
    readout = objective.readout("euler", nfe)
    assert readout.name == f"jumps-{nfe}"
    found = readout.sample(ExactMap(), given["c"], given["x0"])
    torch.testing.assert_close(found, SIGMA * given["x0"])


def test_consistency_training() -> None:
    """The last interval's target is x1 itself; the exact end point is reached in one evaluation."""
    given, net = draw(1), ExactEndpoint()
    objective = ConsistencyTraining(steps=4)
    last = {**given, "t": torch.full_like(given["t"], 0.99)}
    (residual,) = objective.residuals(net, **last)
    s = torch.full_like(given["t"], 0.75)
    torch.testing.assert_close(residual, at_start(given, s) * SIGMA / q(s) - given["x1"])
    found = objective.readout("euler", 1).sample(net, given["c"], given["x0"])
    torch.testing.assert_close(found, SIGMA * given["x0"])
    two = objective.readout("euler", 2).sample(net, given["c"], given["x0"])
    half = torch.full_like(given["t"], 0.5)
    torch.testing.assert_close(two, interpolate(given["x0"], SIGMA * given["x0"], half) * SIGMA / q(half))
    finer = [ConsistencyTraining(n).residuals(net, **given)[0].mean(dtype=torch.float64).abs() for n in (4, 256)]
    assert finer[1] < 0.02
    (first,) = objective.residuals(net, **{**given, "t": torch.zeros_like(given["t"])})
    quarter = torch.full_like(given["t"], 0.25)
    expected = SIGMA * given["x0"] - at_start(given, quarter) * SIGMA / q(quarter)
    torch.testing.assert_close(first, expected)


def test_first_rows() -> None:
    assert first_rows(torch.zeros(2, 8, 1), 0.25).flatten().tolist() == [True] * 2 + [False] * 6
    assert first_rows(torch.zeros(2, 3, 1), 1.0).all()
    assert not first_rows(torch.zeros(2, 3, 1), 0.0).any()


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: MeanFlow(1.5), "--model.objective.share"),
        (lambda: Shortcut(-0.1), "--model.objective.share"),
        (lambda: Shortcut(steps=12), "--model.objective.steps"),
        (lambda: Shortcut(steps=1), "--model.objective.steps"),
        (lambda: ConsistencyTraining(0), "--model.objective.steps"),
    ],
)
def test_settings_that_are_refused(make: Any, flag: str) -> None:
    with pytest.raises(ToyError, match=flag):
        make()
