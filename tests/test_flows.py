import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_toys.errors import ToyError
from lightning_toys.flows import (
    EVALUATIONS_PER_STEP,
    Solver,
    check_nfe,
    integrate,
    integrate_rows,
    interpolate,
    straight_step,
)

Field = Callable[[Tensor, Tensor], Tensor]
ORDERS: dict[Solver, int] = {"euler": 1, "midpoint": 2, "rk4": 4}


def logistic(t: Tensor, x: Tensor) -> Tensor:
    """dx/dt = (1 + t) x (1 - x); x(1) = x0 e^1.5 / (1 - x0 + x0 e^1.5)."""
    return (1 + t) * x * (1 - x)


X0 = torch.tensor([0.1, 0.3, 0.7, 0.9], dtype=torch.float64)
X1 = X0 * math.exp(1.5) / (1 - X0 + X0 * math.exp(1.5))


def slope(field: Field, solver: Solver, x1: Tensor) -> float:
    steps = np.array([8, 16, 32, 64])
    each = EVALUATIONS_PER_STEP[solver]
    errors = [(integrate(field, X0, solver, int(n) * each) - x1).abs().max().item() for n in steps]
    return float(np.polyfit(np.log(1 / steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
def test_order(solver: Solver) -> None:
    assert slope(logistic, solver, X1) == pytest.approx(ORDERS[solver], abs=0.15)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
def test_order_fails_for_a_reversed_velocity_or_time(solver: Solver) -> None:
    wrong: list[Field] = [lambda t, x: -logistic(t, x), lambda t, x: logistic(2 - t, x)]
    for field in wrong:
        assert slope(field, solver, X1) < 0.5


@pytest.mark.parametrize(("solver", "nfe"), [("euler", 1), ("euler", 9), ("euler", 49), ("euler", 93), ("midpoint", 2),
                                             ("midpoint", 98), ("rk4", 4), ("rk4", 196)])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nfe_is_exact(solver: Solver, nfe: int, dtype: torch.dtype) -> None:
    calls: list[float] = []

    def field(t: Tensor, x: Tensor) -> Tensor:
        assert t.dtype == dtype
        calls.append(t.item())
        return x

    integrate(field, torch.ones(2, dtype=dtype), solver, nfe)
    assert len(calls) == nfe
    assert calls[0] == 0
    assert min(calls) >= 0
    assert max(calls) <= 1


def test_euler_by_hand() -> None:
    """x' = t + x from 1 by four steps of 1/4, each evaluated at its left end."""
    x = 1.0
    for k in range(4):
        x += (k / 4 + x) / 4
    out = integrate(lambda t, x: t + x, torch.ones(1, dtype=torch.float64), "euler", 4)
    assert out.item() == pytest.approx(x, abs=1e-14)


def test_midpoint_by_hand() -> None:
    out = integrate(lambda t, x: t + x, torch.ones(1, dtype=torch.float64), "midpoint", 2)
    assert out.item() == pytest.approx(1 + (0.5 + 1.5), abs=1e-14)  # half a step: t = 1/2, x = 1.5


def test_dopri5() -> None:
    out = integrate(logistic, X0, "dopri5", rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out, X1, rtol=0, atol=1e-8)
    loose = integrate(logistic, X0, "dopri5")
    assert 1e-9 < (loose - X1).abs().max() < 1e-3
    reverse = integrate(lambda t, x: -logistic(t, x), X0, "dopri5")
    assert (reverse - X1).abs().max() > 0.1


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "dopri5"])
def test_a_constant_velocity_is_integrated_exactly_and_any_shape_kept(solver: Solver) -> None:
    x0, v = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(5.0).double()
    out = integrate(lambda t, x: v.expand_as(x), x0, solver, 4)
    torch.testing.assert_close(out, x0 + v, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("solver", "nfe"), [("euler", 0), ("midpoint", 1), ("midpoint", 3), ("rk4", 2), ("rk4", 9),
                                             ("rk4", -4)])  # fmt: skip
def test_nfe_that_cannot_be_spent_is_refused(solver: Solver, nfe: int) -> None:
    with pytest.raises(ToyError, match=rf"--model\.evaluation\.nfe: {nfe} "):
        integrate(logistic, X0, solver, nfe)
    with pytest.raises(ToyError, match=r"--some\.flag"):
        check_nfe(solver, nfe, "--some.flag")


def test_dopri5_leaves_nfe_unused() -> None:
    assert torch.equal(integrate(logistic, X0, "dopri5", 1), integrate(logistic, X0, "dopri5", 7))


def test_interpolate_ends_and_slope() -> None:
    g = torch.Generator().manual_seed(1)
    x0, x1 = torch.randn(2, 6, 3, generator=g).double(), torch.randn(2, 6, 3, generator=g).double()
    t = torch.rand(2, 6, 1, generator=g).double()
    assert torch.equal(interpolate(x0, x1, torch.zeros_like(t)), x0)
    assert torch.equal(interpolate(x0, x1, torch.ones_like(t)), x1)
    torch.testing.assert_close(interpolate(x0, x1, t), (1 - t) * x0 + t * x1, rtol=0, atol=1e-14)
    rate = (interpolate(x0, x1, t + 1e-3) - interpolate(x0, x1, t)) / 1e-3
    torch.testing.assert_close(rate, x1 - x0, rtol=0, atol=1e-11)


def test_straight_step_closed_form() -> None:
    x, f = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 5.0]).double()
    # a third of the way is left at s = 2/3 ... at t = 5/6 half of that
    torch.testing.assert_close(straight_step(x, f, 2 / 3, 5 / 6), (x + f) / 2)
    assert torch.equal(straight_step(x, f, 0.4, 0.4), x)
    torch.testing.assert_close(straight_step(x, f, 0.3, 1.0), f)
    torch.testing.assert_close(straight_step(x, f, 0.0, 0.25), 0.75 * x + 0.25 * f)


def test_straight_step_composes() -> None:
    x, f = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 5.0]).double()
    through = straight_step(straight_step(x, f, 0.1, 0.35), f, 0.35, 0.9)
    torch.testing.assert_close(through, straight_step(x, f, 0.1, 0.9), rtol=0, atol=1e-14)


def test_straight_step_solves_its_equation() -> None:
    """dx/dt = (f - x) / (1 - t) from s = 0 to t = 1/2, by a fine integration in u = 2 t."""
    x, f = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 5.0]).double()
    out = integrate(lambda u, y: 0.5 * (f - y) / (1 - 0.5 * u), x, "rk4", 400)
    torch.testing.assert_close(straight_step(x, f, 0.0, 0.5), out, rtol=0, atol=1e-10)


def test_rows_are_integrated_by_steps_of_their_own() -> None:
    """Against the closed form; a row's result and its evaluations are those that it has alone."""
    rates = torch.tensor([[[0.0]], [[2.0]], [[-30.0]]], dtype=torch.float64)  # three replicas, one of them stiff
    x0 = torch.linspace(0.5, 1.5, 5, dtype=torch.float64).view(1, 5, 1).expand(3, 5, 2)
    seen: list[float] = []

    def field(rates: Tensor) -> Field:
        def velocity(t: Tensor, x: Tensor) -> Tensor:
            assert t.shape == (*x.shape[:-1], 1)
            seen.append(float(t.max()))
            return rates * x + t

        return velocity

    def exact(rate: float) -> Tensor:
        if rate == 0:
            return x0[0] + 0.5
        return (x0[0] + 1 / rate**2) * math.exp(rate) - 1 / rate - 1 / rate**2

    found, evaluations = integrate_rows(field(rates), x0)
    for r, rate in enumerate((0.0, 2.0, -30.0)):
        torch.testing.assert_close(found[r], exact(rate), rtol=3e-4, atol=1e-4)
        alone, count = integrate_rows(field(rates[r : r + 1]), x0[r : r + 1, 1:3])
        torch.testing.assert_close(alone[0], found[r, 1:3], rtol=0, atol=1e-12)
        assert torch.equal(count[0], evaluations[r, 1:3])
    assert evaluations[2].min() > evaluations[0].max() >= 1 + 6 * 4  # no step is longer than a quarter
    assert ((evaluations - 1) % 6 == 0).all()
    assert max(seen) <= 1.0
    tight, _ = integrate_rows(field(rates), x0, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tight[1], exact(2.0), rtol=1e-8, atol=0)


def test_a_row_that_cannot_be_integrated_is_nan_and_alone() -> None:
    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return torch.where(x > 5, torch.nan, x * 0 + 1)

    found, _ = integrate_rows(velocity, torch.tensor([[4.5], [1.0]], dtype=torch.float64))
    assert found[0].isnan().all()
    assert found[1].item() == pytest.approx(2.0)
