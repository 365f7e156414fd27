import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from lightning_toys.generative_policy.gaussian import (
    bounded_log_sigma,
    gauss_hermite_grid,
    log_tanh_derivative,
    squash,
    tanh_gaussian_log_prob,
)
from lightning_toys.generative_policy.mixture import Mixture
from lightning_toys.training.noise import keyed_generator

CASES = [(0.0, 0.5), (0.3, 0.8), (-1.2, 0.3), (0.4, 1.5)]


def draw(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, f"test/gaussian/{name}").standard_normal(shape))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_tanh_log_slope_is_the_logarithm_of_the_slope() -> None:
    y = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.tanh(y).sum(), y)
    torch.testing.assert_close(log_tanh_derivative(y), slope.log(), rtol=0, atol=1e-8)
    # the slope is 1 / cosh^2, also where it rounds to 0
    far = numbers(-300, -20, -8, 8, 20, 300)
    torch.testing.assert_close(log_tanh_derivative(far), 2 * (math.log(2) - far.abs()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("mu", "sigma"), CASES)
def test_density_integrates_to_one_and_is_the_slope_of_the_distribution_function(mu: float, sigma: float) -> None:
    m, s = numbers(mu), numbers(math.log(sigma))

    def density(a: float) -> float:
        return tanh_gaussian_log_prob(numbers(a), m, s).exp().item()

    inner = np.tanh([mu - 2 * sigma, mu, mu + 2 * sigma])
    ends = [-1 + 1e-12, *inner, 1 - 1e-12]
    total = sum(quad(density, a, b, limit=200)[0] for a, b in pairwise(ends))
    assert total == pytest.approx(1, abs=1e-6)
    for a in (-0.9, -0.1, 0.5, 0.95):
        up, down = (norm.cdf((np.arctanh(a + h) - mu) / sigma) for h in (1e-5, -1e-5))
        assert density(a) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-9)


def test_two_coordinates_are_a_product() -> None:
    mu, s, a = draw("mu", 5, 2), 0.3 * draw("s", 5, 2), torch.tanh(draw("a", 5, 2))
    parts = [tanh_gaussian_log_prob(a[:, i : i + 1], mu[:, i : i + 1], s[:, i : i + 1]) for i in range(2)]
    torch.testing.assert_close(tanh_gaussian_log_prob(a, mu, s), parts[0] + parts[1], rtol=0, atol=1e-12)


def test_squash_is_its_action_and_the_log_prob_of_it() -> None:
    mu, s, xi = draw("mu", 3, 7, 2), 0.3 * draw("s", 3, 7, 2), draw("xi", 3, 7, 2)
    a, log_prob = squash(mu, s, xi)
    torch.testing.assert_close(a, torch.tanh(mu + s.exp() * xi), rtol=0, atol=1e-15)
    assert log_prob.shape == (3, 7)
    torch.testing.assert_close(log_prob, tanh_gaussian_log_prob(a, mu, s), rtol=1e-7, atol=1e-7)
    # by the change of variables: the density of xi over |da / dxi|
    rate = torch.vmap(torch.func.jacrev(lambda m, q, x: squash(m, q, x)[0], argnums=2))(
        *(v.view(21, 2) for v in (mu, s, xi))
    )
    base = torch.from_numpy(norm.logpdf(xi.numpy())).sum(-1)
    torch.testing.assert_close(log_prob, base - torch.linalg.slogdet(rate)[1].view(3, 7), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_actions_are_finite_in_value_and_gradient(dtype: torch.dtype) -> None:
    mu = torch.tensor([[20.0, -20.0], [0.0, 20.0], [-20.0, -20.0]], dtype=dtype, requires_grad=True)
    s = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    a, log_prob = squash(mu, s, 0.5 * torch.ones(3, 2, dtype=dtype))
    log_prob.sum().backward()  # type: ignore[no-untyped-call]
    assert a.abs().max() <= 1
    assert log_prob.isfinite().all()
    assert mu.grad is not None
    assert s.grad is not None
    assert s.grad.isfinite().all()
    # far out log pi = ... - 2 log 2 + 2 |y|
    torch.testing.assert_close(mu.grad, 2 * torch.tanh(mu.detach() + 0.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nodes", [2, 5, 32])
def test_hermite_grid_is_exact_for_polynomials(nodes: int) -> None:
    xi, w = gauss_hermite_grid(nodes)
    assert xi.shape == (nodes**2, 2)
    assert xi.dtype == w.dtype == torch.float64
    moments = {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 6: 15.0, 8: 105.0, 9: 0.0}
    for p, first in moments.items():
        for q, second in moments.items():
            if max(p, q) < 2 * nodes:
                found = (w * xi[:, 0] ** p * xi[:, 1] ** q).sum().item()
                assert found == pytest.approx(first * second, abs=1e-9 * max(1, first * second))


@pytest.mark.parametrize(("bound", "low", "high"), [("tanh", -5.0, 2.0), ("clip", -20.0, 2.0)])
def test_bounds_of_log_sigma(bound: str, low: float, high: float) -> None:
    raw = torch.linspace(-50, 50, 1001, dtype=torch.float64)
    found = bounded_log_sigma(raw, bound)  # type: ignore[arg-type]
    assert found.min().item() == pytest.approx(low, abs=1e-12)
    assert found.max().item() == pytest.approx(high, abs=1e-12)
    assert (found.diff() >= 0).all()
    near = bounded_log_sigma(numbers(-0.1, 0.0, 0.1), bound)  # type: ignore[arg-type]
    assert near[1].item() == pytest.approx(-1.5 if bound == "tanh" else 0.0)
    assert (near[2] - near[0]).item() == pytest.approx(7 * math.tanh(0.1) if bound == "tanh" else 0.2)


def test_kl_between_squashed_gaussians_is_that_of_the_gaussians() -> None:
    """A bijection leaves KL alone, so values and reparametrised gradients are closed form."""
    mu, s = (v.clone().requires_grad_() for v in (numbers(0.3, -0.2), numbers(-1.0, -0.6)))
    m, q = numbers(-0.1, 0.4), numbers(-0.7, -0.8)
    xi, w = gauss_hermite_grid(8)
    a, log_prob = squash(mu, s, xi)
    estimate = w @ (log_prob - tanh_gaussian_log_prob(a, m, q))
    closed = (q - s + ((2 * s).exp() + (mu - m).square()) / (2 * (2 * q).exp()) - 0.5).sum()
    assert estimate.item() == pytest.approx(closed.item(), abs=1e-9)
    for found, wanted in zip(torch.autograd.grad(estimate, (mu, s)), torch.autograd.grad(closed, (mu, s)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)
        assert wanted.abs().min() > 0.01


def test_reparametrised_gradient_is_the_slope_of_the_kl() -> None:
    """KL(pi || target) on the actions, by quadrature over a fixed grid of actions instead of over the noise."""
    target = Mixture([[0.2, 0.1], [-0.3, 0.4]], [0.4, 0.5], [2, 1])
    xi, w = gauss_hermite_grid(40)
    grid = torch.atanh(torch.linspace(-1, 1, 402, dtype=torch.float64)[1:-1])
    y = torch.linspace(grid[0].item(), grid[-1].item(), 400, dtype=torch.float64)
    a = torch.tanh(torch.cartesian_prod(y, y))
    area = (y[1] - y[0]).square() * (1 - a.square()).prod(-1)  # da = (1 - a^2) dy

    def kl(theta: Tensor) -> Tensor:
        log_pi = tanh_gaussian_log_prob(a, theta[:2], theta[2:])
        return (area * log_pi.exp() * (log_pi - target.log_prob(a))).sum()

    theta = numbers(0.15, 0.05, -1.3, -1.1).requires_grad_()
    actions, log_prob = squash(theta[:2], theta[2:], xi)
    estimate = w @ (log_prob - target.log_prob(actions))
    (slope,) = torch.autograd.grad(estimate, theta)
    with torch.no_grad():
        assert estimate.item() == pytest.approx(kl(theta).item(), abs=1e-6)
        steps = 1e-4 * torch.eye(4).double()
        differences = torch.stack([(kl(theta + d) - kl(theta - d)) / 2e-4 for d in steps])
    torch.testing.assert_close(slope, differences, rtol=0, atol=1e-5)
    assert slope.abs().min() > 0.01
