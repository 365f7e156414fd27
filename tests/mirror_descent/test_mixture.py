"""Mixtures: noising, tilts, conditionals, scores, draws, soft values, against brute force, autograd and quadrature."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy import stats as scipy_stats
from torch.distributions import MultivariateNormal

from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent import (
    ActionValue,
    GaussianMixture,
    Linear,
    QuadraticForm,
    QuadraticReward,
    Quartic,
    Reward,
    StateReward,
    Step,
)
from lightning_toys.mirror_descent.guidance import HTransform
from lightning_toys.mirror_descent.joint import Array, LinearGaussianJoint
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise
from lightning_toys.mirror_descent.mixture import GaussianMixtureJoint, Mixture
from lightning_toys.mirror_descent.mixture_model import MixtureModel, component_of
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.rewards import SmoothedReward, log_mean_exp
from lightning_toys.mirror_descent.tilt import tilt
from lightning_toys.mirror_descent.truth import ClosedForm, Quadrature, truth_of
from lightning_toys.training.noise import keyed_generator

LIKE = torch.zeros((), dtype=torch.float64)


def random_mixture(i: int, J: int, D: int, action_dim: int) -> Mixture:
    """Well-mixed parameters at which nothing is 0 and no two components are alike."""
    g = keyed_generator(i, 0, "test/mirror/mixture")
    roots = 0.45 * np.eye(D) + 0.2 * g.normal(size=(J, D, D))
    w = np.exp(0.5 * g.normal(size=J))
    covariances = roots @ roots.transpose(0, 2, 1) + 0.1 * np.eye(D)
    return Mixture(w / w.sum(), 1.2 * g.normal(size=(J, D)), covariances, action_dim)


PLANE, SPACE, FOUR = random_mixture(1, 3, 2, 1), random_mixture(2, 2, 3, 2), random_mixture(3, 3, 4, 2)


def problem_of(q: Mixture, reward: Reward, lam: float = 1.0, **settings: Any) -> Problem:
    return Problem(GaussianMixtureJoint(q), reward, Linear(), lam, Settings(**settings), MixtureModel())


def grid_points(D: int, half: float, n: int) -> tuple[Array, float]:
    """Points (n^D, D) of an even grid, and the volume of a cell."""
    axis = np.linspace(-half, half, n)
    mesh = np.meshgrid(*[axis] * D, indexing="ij")
    return np.stack([m.ravel() for m in mesh], -1), float((axis[1] - axis[0]) ** D)


def test_density_and_conditional() -> None:
    """The density is the sum of scipy's; s' given a is the joint over the marginal."""
    x = np.array([[0.3, -0.4], [1.1, 0.2], [-1.0, 1.5]])
    want = sum(
        w * scipy_stats.multivariate_normal(m, C).pdf(x)
        for w, m, C in zip(PLANE.weights, PLANE.means, PLANE.covariances, strict=True)
    )
    np.testing.assert_allclose(np.exp(PLANE.log_density(x)), want, rtol=1e-12)
    truth = truth_of(PLANE, ActionValue(), 0.7)
    for a, s in x:
        joint, marginal = (
            integrate.quad(
                lambda t, at=a: float(np.exp(PLANE.log_density(np.array([[at, t]]))[0])), -15, end, limit=200
            )[0]
            for end in (s, 15)
        )
        assert truth.conditional_cdf(np.array([[a, s]]))[0, 0] == pytest.approx(joint / marginal, abs=1e-7)


@pytest.mark.parametrize("abar", [0.2, 0.8])
def test_noised_density_is_the_convolution(abar: float) -> None:
    x0, cell = grid_points(2, 7.0, 281)
    p = np.exp(PLANE.log_density(x0)) * cell
    x = np.array([[0.5, -0.3], [-1.2, 0.9]])
    away = x[:, None] - math.sqrt(abar) * x0
    kernel = np.exp(-0.5 * np.square(away).sum(-1) / (1 - abar)) / (2 * math.pi * (1 - abar))
    np.testing.assert_allclose(np.exp(PLANE.noised(abar).log_density(x)), kernel @ p, rtol=1e-6)


@pytest.mark.parametrize(
    ("q", "n"), [(PLANE, 301), pytest.param(SPACE, 111, marks=pytest.mark.slow)], ids=["1+1", "2+1"]
)
def test_quadratic_tilt_by_brute_force(q: Mixture, n: int) -> None:
    """Weights, means, covariances, Z and E Q of the tilt against sums over a grid of q exp(lambda Q)."""
    d = q.action_dim
    reward = QuadraticReward([0.8, 1.7][:d], [0.9, -0.6][:d])
    x, cell = grid_points(q.dim, 6.5, n)
    Q = -0.5 * (np.array([0.8, 1.7])[:d] * (x[:, :d] - np.array([0.9, -0.6])[:d]) ** 2).sum(1)
    w = np.exp(q.log_density(x) + 1.3 * Q) * cell
    truth = truth_of(q, reward, 1.3)
    assert truth.log_z == pytest.approx(math.log(w.sum()), abs=1e-6)
    w /= w.sum()
    mean = w @ x
    np.testing.assert_allclose(truth.mean, mean, atol=1e-6)
    np.testing.assert_allclose(truth.covariance, np.einsum("n,nd,ne->de", w, x - mean, x - mean), atol=1e-6)
    assert truth.mean_reward == pytest.approx(w @ Q, abs=1e-6)
    # the probability of a component given x is that of q: the tilt cancels
    np.testing.assert_allclose(truth.weights, w @ q.responsibilities(x), atol=1e-6)
    assert truth.mixture is not None
    r = truth.mixture.responsibilities(x[::997])
    np.testing.assert_allclose(r, q.responsibilities(x[::997]), atol=1e-9)
    for j in range(len(q.weights)):  # each component's own moments
        share = w * q.responsibilities(x)[:, j]
        share /= share.sum()
        np.testing.assert_allclose(truth.mixture.means[j], share @ x, atol=1e-5)


def test_one_component_is_the_linear_gaussian_problem() -> None:
    joint = LinearGaussianJoint(0.3, 0.8, -0.7, 0.6, 0.5, 1.2, -0.4)
    one = Mixture(np.ones(1), joint.clean.m[None], joint.clean.C[None], 1)
    want, truth = tilt(joint.clean, ActionValue(0.9, -0.5), 1.4), truth_of(one, ActionValue(0.9, -0.5), 1.4)
    target = joint.with_action_marginal(want.mu, 1 / want.tau)
    assert truth.log_z == pytest.approx(want.log_z, abs=1e-12)
    np.testing.assert_allclose(truth.mean, target.m, atol=1e-12)
    np.testing.assert_allclose(truth.covariance, target.C, atol=1e-12)
    problem = problem_of(one, ActionValue(0.9, -0.5), 1.4)
    assert problem.tilted.importance_ess_fraction == pytest.approx(want.importance_ess_fraction, abs=1e-12)
    assert problem.tilted.tau == pytest.approx(want.tau, abs=1e-12)
    for abar in (0.1, 0.7):
        np.testing.assert_allclose(one.noised(abar).covariances[0], joint.level(abar).C, atol=1e-14)


@pytest.mark.parametrize("abar", [0.3, 1.0])
def test_score_and_jacobian_by_autograd(abar: float) -> None:
    model, level = MixtureModel(), FOUR.noised(abar) if abar < 1 else FOUR
    x = torch.from_numpy(keyed_generator(0, 0, "test/points").normal(size=(4, 6))).requires_grad_(True)
    log_q = model.log_density(level, x)
    np.testing.assert_allclose(log_q.detach().numpy(), level.log_density(x.detach().numpy().T), atol=1e-12)
    (S,) = torch.autograd.grad(log_q.sum(), x, create_graph=True)
    H = torch.stack([torch.autograd.grad(S[i].sum(), x, retain_graph=True)[0] for i in range(4)])
    found, jacobian = model.score_and_jacobian(level, x.detach())
    torch.testing.assert_close(found, S.detach())
    torch.testing.assert_close(model.score(level, x.detach()), S.detach())
    torch.testing.assert_close(jacobian, H)


def test_action_target_by_autograd() -> None:
    for q, reward in ((FOUR, QuadraticReward([0.5, 1.0], [0.3, -0.8])), (PLANE, Quartic(0.8, 1.3, 0.2))):
        problem = problem_of(q, reward, 1.4)
        a = torch.from_numpy(keyed_generator(1, 0, "test/points").normal(size=(q.action_dim, 5))).requires_grad_(True)
        value, gradient = MixtureModel().action_target(problem.tilted)(a.detach())
        want = torch.logsumexp(
            torch.stack([
                math.log(w) + MultivariateNormal(torch.from_numpy(m), torch.from_numpy(C)).log_prob(a.T)
                for w, m, C in zip(q.weights, q.actions.means, q.actions.covariances, strict=True)
            ]), 0) + 1.4 * reward.value(a)  # fmt: skip
        torch.testing.assert_close(value, want.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), a)[0])


def z_of(values: Array, want: Array | float) -> Array:
    out: Array = (values.mean(0) - want) / (values.std(0, ddof=1) / math.sqrt(len(values)))
    return out


@pytest.mark.parametrize("q", [PLANE, FOUR], ids=["1+1", "2+2"])
def test_draws(q: Mixture) -> None:
    """Draws of q, of s' | a, and of the reverse kernel have the moments of what they should be."""
    model, noise = MixtureModel(), Noise([(5, 0), (5, 1)], "test/mixture", LIKE)
    x = model.draw(noise, q).T.numpy()
    assert np.abs(z_of(x, q.mean)).max() < 4.5
    away = x - q.mean
    assert np.abs(z_of(away[:, :, None] * away[:, None], q.covariance)).max() < 4.5
    assert np.abs(z_of(q.responsibilities(x), q.weights)).max() < 4.5
    a = model.draw_action(noise, q)
    again = torch.cat([a, model.draw_state(noise, q, a)]).T.numpy()
    u = truth_of(q, ActionValue(), 0.0).conditional_cdf(again)
    assert np.abs(z_of(u, 0.5)).max() < 4.5
    assert np.abs(z_of(np.square(u - 0.5), 1 / 12)).max() < 4.5
    away = again - q.mean
    assert np.abs(z_of(away[:, :, None] * away[:, None], q.covariance)).max() < 4.5
    assert np.abs(z_of(q.responsibilities(again), q.weights)).max() < 4.5
    # noisy -> cleaner: the pair's cross moment is g E[x' x'], and x' is the cleaner level's
    low, high = q.noised(0.3), q.noised(0.8)
    noisy = model.draw(noise, low)
    cleaner = model.draw_reverse(noise, low, high, noisy).T.numpy()
    g = math.sqrt(0.3 / 0.8)
    second = high.covariance + np.outer(high.mean, high.mean)
    assert np.abs(z_of(cleaner[:, :, None] * cleaner[:, None], second)).max() < 4.5
    assert np.abs(z_of(cleaner[:, :, None] * noisy.T.numpy()[:, None], g * second)).max() < 4.5
    assert np.abs(z_of(high.responsibilities(cleaner), high.weights)).max() < 4.5


def test_component_of() -> None:
    probability = torch.tensor([[0.2], [0.5], [0.3]]).expand(3, 4)
    assert component_of(torch.tensor([0.0, 0.19, 0.2, 0.999]), probability).tolist() == [0, 0, 1, 2]
    assert component_of(torch.tensor([0.5]), torch.ones(1, 1)).tolist() == [0]


@pytest.mark.parametrize("reward", [QuadraticReward([1.2], [0.8]), Quartic(0.7, 1.2, 0.1), Step(1.5, 0.2)])
def test_h_transform_is_the_gradient_of_the_soft_value(reward: Reward) -> None:
    """Against finite differences of log E[exp(lambda Q(a_0)) | x], summed over a grid of x_0."""
    lam, abar, h = 1.3, 0.6, 1e-4
    x0, cell = grid_points(2, 6.0, 601 if isinstance(reward, Step) else 301)
    log_p = PLANE.log_density(x0) + math.log(cell)
    weight = lam * reward.value(torch.from_numpy(x0[:, :1].T)).numpy()

    def log_h(x: Array) -> float:
        log_w = log_p - 0.5 * np.square(x - math.sqrt(abar) * x0).sum(1) / (1 - abar)
        top = log_w.max()
        return math.log(np.exp(log_w - top + weight).sum() / np.exp(log_w - top).sum())

    rule = HTransform(GaussianMixtureJoint(PLANE), reward, lam)
    for x in (np.array([0.4, -0.6]), np.array([-0.9, 0.8])):
        want = [(log_h(x + h * e) - log_h(x - h * e)) / (2 * h) for e in np.eye(2)]
        found = MixtureModel().soft_value_gradient(PLANE.noised(abar), rule, torch.from_numpy(x)[:, None])[:, 0]
        np.testing.assert_allclose(found.numpy(), want, atol=2e-2 if isinstance(reward, Step) else 1e-5)


def test_importance_weights_without_a_variance() -> None:
    """q(a) exp(beta Q) has an integral, q(a) exp(2 beta Q) none: no effective sample size, of closed forms or not."""
    q = Mixture(np.array([0.4, 0.6]), np.array([[-0.5, 0.0], [0.5, 0.0]]), np.array([np.eye(2)] * 2), 1)
    for reward in (Hill(), Convex()):
        problem = problem_of(q, reward)
        assert math.isfinite(problem.tilted.log_z)
        assert problem.tilted.importance_ess_fraction == 0.0
    for reward in (Hill(), Convex()):
        with pytest.raises(ToyError, match="has no integral"):
            truth_of(q, reward, 2.0)


class Convex(Reward):
    """0.35 a^2, which does not say that it is a quadratic."""

    def value(self, a: torch.Tensor) -> torch.Tensor:
        return 0.35 * a[0].square()


class Hill(Convex):
    """The same, which says so."""

    def quadratic(self, action_dim: int) -> QuadraticForm:
        return QuadraticForm(-0.7 * np.eye(action_dim), np.zeros(action_dim), 0.0)


def test_next_states_of_narrow_components_have_their_distribution_function() -> None:
    """Two far modes of s' with standard deviation 0.02: the table of points is as fine as they are."""
    C = np.array([[[1.0, 0.0], [0.0, 4e-4]]] * 2)
    q = Mixture(np.array([0.5, 0.5]), np.array([[0.0, -3.0], [0.0, 3.0]]), C, 1)
    distribution, want = (
        Quadrature(q, Plain(), 1.0),
        ClosedForm(q, QuadraticForm(np.array([[1.2]]), np.array([0.96]), 0.0), 1.0),
    )
    at = np.linspace(-4, 4, 2001)
    np.testing.assert_allclose(distribution.cdf(1, at), want.cdf(1, at), atol=2e-3)
    assert distribution.weights[0] == pytest.approx(0.5, abs=1e-9)


def test_the_bound_on_the_error_grows_with_the_moments() -> None:
    """A ratio's error is (1 + |ratio|) of the integrals', a covariance's 2 |mean| of that more."""
    near, far = (
        Quadrature(Mixture(np.ones(1), np.array([[m, 0.0]]), np.eye(2)[None], 1), Flat(), 1.0) for m in (0, 50)
    )
    one = far.moments_error(1e-12, np.array([[1.0], [50.0], [2501.0]]))
    assert one >= 1e-12 * (1 + 2501) + 2 * 50 * 1e-12 * 51
    assert near.moments_error(1e-12, np.array([[1.0], [0.0], [1.0]])) == pytest.approx(2e-12, rel=1e-6)
    assert abs(far.covariance[0, 0] - 1) < far.error


class Flat(Reward):
    """Tilts nothing."""

    def value(self, a: torch.Tensor) -> torch.Tensor:
        return 0.0 * a[0]


# rewards of any form


class Plain(Reward):
    """A quadratic that does not say so."""

    def value(self, a: torch.Tensor) -> torch.Tensor:
        return -0.6 * (a[0] - 0.8).square()


def test_quadrature_gives_the_closed_form() -> None:
    want = ClosedForm(PLANE, QuadraticForm(np.array([[1.2]]), np.array([0.96]), -0.384), 1.4)
    found = Quadrature(PLANE, Plain(), 1.4)
    assert found.log_z == pytest.approx(want.log_z, abs=1e-10)
    np.testing.assert_allclose(found.weights, want.weights, atol=1e-10)
    np.testing.assert_allclose(found.mean, want.mean, atol=1e-10)
    np.testing.assert_allclose(found.covariance, want.covariance, atol=1e-9)
    assert found.mean_reward == pytest.approx(want.mean_reward, abs=1e-10)
    assert 0 < found.error < 1e-8
    at = np.linspace(-2, 2, 9)
    for i in range(2):
        np.testing.assert_allclose(found.cdf(i, at), want.cdf(i, at), atol=2e-5)
    np.testing.assert_allclose(found.quantiles(1, 7), want.quantiles(1, 7), atol=2e-4)
    for truth in (found, want):
        x = truth.draw(3, 40_000)
        assert np.abs(z_of(x, want.mean)).max() < 4.5
        away = x - want.mean
        assert np.abs(z_of(away[:, :, None] * away[:, None], want.covariance)).max() < 4.5
        assert np.abs(z_of(PLANE.responsibilities(x), want.weights)).max() < 4.5


@pytest.mark.parametrize("reward", [Quartic(1.0, 1.2, 0.2), pytest.param(Step(2.0, 0.4), marks=pytest.mark.slow)])
def test_quadrature_by_brute_force(reward: Reward) -> None:
    x, cell = grid_points(2, 6.5, 1301 if isinstance(reward, Step) else 401)
    Q = reward.value(torch.from_numpy(x[:, :1].T)).numpy()
    w = np.exp(PLANE.log_density(x) + Q) * cell
    truth = truth_of(PLANE, reward, 1.0)
    close = 1e-3 if isinstance(reward, Step) else 1e-7  # the grid does not know where the step is
    assert truth.log_z == pytest.approx(math.log(w.sum()), abs=close)
    w /= w.sum()
    np.testing.assert_allclose(truth.mean, w @ x, atol=2 * close)
    np.testing.assert_allclose(truth.weights, w @ PLANE.responsibilities(x), atol=2 * close)
    away = x - w @ x
    np.testing.assert_allclose(truth.covariance, np.einsum("n,nd,ne->de", w, away, away), atol=4 * close)
    assert truth.mean_reward == pytest.approx(w @ Q, abs=2 * close)


@pytest.mark.parametrize("reward", [Quartic(0.7, 1.2, 0.1), Step(1.5, 0.2), Plain()])
def test_smoothing(reward: Reward) -> None:
    """log E exp(scale Q(a + std z)) by scipy's quadrature, its derivative by differences; far out nothing overflows."""
    scale, std = 1.7, 0.6

    def want(a: float) -> float:
        def f(z: float) -> float:
            at = torch.tensor([[a + std * z]], dtype=torch.float64)
            return math.exp(scale * float(reward.value(at)[0]) - 0.5 * z * z)

        jumps = [(p - a) / std for p in reward.breakpoints]
        return math.log(integrate.quad(f, -9, 9, points=jumps, limit=400)[0] / math.sqrt(2 * math.pi))

    a = torch.tensor([[-0.7, 0.1, 0.9]], dtype=torch.float64)
    smooth = SmoothedReward(reward, scale, std, 1.0)
    np.testing.assert_allclose(smooth.value(a), [want(float(v)) for v in a[0]], atol=1e-8)
    differences = [(want(float(v) + 1e-4) - want(float(v) - 1e-4)) / 2e-4 for v in a[0]]
    np.testing.assert_allclose(smooth.gradient(a)[0], differences, atol=1e-5)
    far = torch.tensor([[40.0, -40.0]], dtype=torch.float64)
    assert torch.isfinite(smooth.gradient(far)).all()
    # the rule by nodes alone, of a step too, to the width of a node
    value, _ = log_mean_exp(reward, a[0], std, scale)
    np.testing.assert_allclose(value, smooth.value(a), atol=0.1 if isinstance(reward, Step) else 1e-8)


@pytest.mark.parametrize("height", [1e-9, 20.0, -20.0, 100.0, -100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoothed_step_of_any_height(height: float, dtype: torch.dtype) -> None:
    """Value and derivative against quadrature of each side of the edge in logarithms, far from the edge too."""
    std, at = 0.5, np.linspace(-15, 15, 31)  # in standard deviations from the edge
    h = 5e-3
    t, w = np.arange(0, 5601) * h, np.full(5601, h)
    w[[0, -1]] *= 0.5  # trapezoidal, with its end correction below

    def log_side(start: Array) -> Array:
        """log P(z > start), of a standard normal."""
        z = start[:, None] + t
        log_p = -0.5 * np.square(z) - 0.5 * math.log(2 * math.pi)
        # Euler-Maclaurin: the derivative of the density at the start is -start times it
        return np.logaddexp.reduce(log_p + np.log(w), 1) + np.log1p(
            -h * h / 12 * start * np.exp(log_p[:, 0] - np.logaddexp.reduce(log_p + np.log(w), 1))
        )

    def want(u: Array) -> Array:
        return np.logaddexp(log_side(u), height + log_side(-u))

    a = torch.from_numpy(0.3 + std * at).to(dtype).unsqueeze(0)
    u = (a[0].double().numpy() - 0.3) / std
    smooth = SmoothedReward(Step(height, 0.3), 1.0, std, 1.0)
    exact = dtype is torch.float64
    np.testing.assert_allclose(smooth.value(a), want(u), rtol=1e-7 if exact else 2e-6, atol=1e-12 if exact else 1e-7)
    slope = (want(u + 1e-4) - want(u - 1e-4)) / 2e-4 / std
    np.testing.assert_allclose(smooth.gradient(a)[0], slope, rtol=1e-5, atol=1e-7)
    assert torch.isfinite(smooth.gradient(torch.tensor([[-1e3, 1e3]], dtype=dtype))).all()


@pytest.mark.parametrize("height", [20.0, 80.0])
@pytest.mark.parametrize("std", [0.3, 1.0])
def test_smoothing_of_sharp_rewards(height: float, std: float) -> None:
    """A quartic of narrow wells, seen from both sides of them and from afar, against sums of 200 001 nodes."""
    reward, at = Quartic(height), np.array([-2.5, -1.0, -0.3, 0.0, 0.8, 4.0])
    y = np.linspace(-3.0, 3.0, 200_001)
    Q = reward.value(torch.from_numpy(y).unsqueeze(0)).numpy()

    def want(a: Array) -> Array:
        log_p = -0.5 * np.square((y - a[:, None]) / std) + math.log((y[1] - y[0]) / std / math.sqrt(2 * math.pi))
        return np.array([np.logaddexp.reduce(row) for row in log_p + Q])

    value, slope = log_mean_exp(reward, torch.from_numpy(at), std, 1.0)
    np.testing.assert_allclose(value, want(at), atol=1e-7)
    np.testing.assert_allclose(slope, (want(at + 1e-4) - want(at - 1e-4)) / 2e-4, rtol=1e-5, atol=1e-5)


class Comb(Reward):
    """Waves that no rule resolves."""

    def value(self, a: torch.Tensor) -> torch.Tensor:
        return 1e3 * torch.sin(1e5 * a[0])


def test_a_smoothing_that_is_not_known_is_refused() -> None:
    with pytest.raises(ToyError, match="Comb is not allowed here, its smoothing is not known"):
        log_mean_exp(Comb(), torch.linspace(-1, 1, 50), 0.5, 1.0)


def test_quadratic_forms() -> None:
    """Value, gradient, and smoothing up to a constant, against autograd and scipy."""
    A, b = np.array([[1.4, 0.3], [0.3, 0.8]]), np.array([0.4, -0.9])
    form = QuadraticForm(A, b, 0.7)
    a = torch.tensor([[0.3, -1.0], [0.8, 0.2]], dtype=torch.float64, requires_grad=True)
    want = 0.7 + torch.from_numpy(b) @ a - 0.5 * (a * (torch.from_numpy(A) @ a)).sum(0)
    torch.testing.assert_close(form.value(a.detach()), want.detach())
    torch.testing.assert_close(form.gradient(a.detach()), torch.autograd.grad(want.sum(), a)[0])
    smooth = form.smoothed(1.5, 0.4, 0.9)
    nodes, cell = grid_points(2, 7.0, 241)

    def brute(at: Array) -> float:
        moved = torch.from_numpy((at + math.sqrt(0.4) * nodes).T)
        log_w = 1.5 * form.value(moved).numpy() - 0.5 * np.square(nodes).sum(1) + math.log(cell / (2 * math.pi))
        return 0.9 / 1.5 * math.log(np.exp(log_w).sum())

    first, second = np.array([0.3, 0.8]), np.array([-1.0, 0.2])
    found = smooth.value(a.detach())
    assert float(found[0] - found[1]) == pytest.approx(brute(first) - brute(second), abs=1e-8)
    for reward in (QuadraticReward([1.4, 0.8], [0.5, -0.2]), ActionValue(0.6, 1.1)):
        found = reward.quadratic(2)
        torch.testing.assert_close(found.value(a.detach()), reward.value(a.detach()))


class Growing(Reward):
    """No integral."""

    def value(self, a: torch.Tensor) -> torch.Tensor:
        return a[0].square().square()


class Odd(Reward):
    """Of the wrong shape."""

    def value(self, a: torch.Tensor) -> torch.Tensor:
        return a.sum()


REFUSED: list[tuple[Any, str]] = [
    (lambda: truth_of(PLANE, Growing(), 1.0), "has no integral between"),
    (lambda: truth_of(PLANE, Odd(), 1.0), r"is of shape \(\); give \(8001,\) finite numbers"),
    (lambda: truth_of(SPACE, Quartic(), 1.0), "is not allowed with --data.action_dim 2"),
    (lambda: truth_of(PLANE, StateReward(), 1.0), r"StateReward is not allowed here, it has no value\(a\)"),
    (lambda: truth_of(SPACE, QuadraticReward([1.0], [0.0]), 1.0), "1 numbers is|1 numbers are not allowed"),
    (lambda: truth_of(PLANE, ActionValue(), -30.0), "has no integral .precision -"),
    (lambda: QuadraticReward([1.0, 2.0], [0.0]), "give as many"),
    (lambda: QuadraticReward([-1.0], [0.0]), "--model.reward.weights: -1.0"),
    (lambda: GaussianMixture(weights=[0.5]), "2 lists are not allowed with 1 of --data.weights"),
    (lambda: GaussianMixture(weights=[0.0, 0.0]), "not all 0"),
    (lambda: GaussianMixture(means=[[0.0], [1.0]]), "1 coordinates are not allowed; give 2 to 16"),
    (lambda: GaussianMixture(means=[[0.0] * 17, [1.0] * 17]), "17 coordinates are not allowed; give 2 to 16"),
    (lambda: GaussianMixture(action_dim=2), "--data.action_dim: 2 is not allowed"),
    (lambda: GaussianMixture(covariances=[[[1.0, 2.0], [2.0, 1.0]]] * 2), "eigenvalues above 0, not -1"),
    (lambda: GaussianMixture(covariances=[[[1.0, 0.2], [0.0, 1.0]]] * 2), "give symmetric ones"),
    (lambda: GaussianMixture(means=[[0.0, 0.0], [1.0]]), r"--data.means: .* is not allowed; give a list"),
]


@pytest.mark.parametrize(("make", "says"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused(make: Any, says: str) -> None:
    with pytest.raises(ToyError, match=says) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1


def test_sixteen_dimensions() -> None:
    """Draws of the largest mixture, tilted by importance weights, have the closed form's moments."""
    q = random_mixture(9, 4, 16, 5)
    reward = QuadraticReward([0.2] * 5, [0.5] * 5)
    truth = truth_of(q, reward, 1.0)
    x = MixtureModel().draw(Noise([(1, k) for k in range(4)], "test/sixteen", LIKE), q)
    w = torch.exp(reward.value(x[:5])).numpy()
    assert x.shape == (16, 4 * BLOCK_SIZE)
    assert abs(z_of(w, math.exp(truth.log_z))) < 4.5
    assert np.abs(z_of(w[:, None] * (x.T.numpy() - truth.mean), 0.0)).max() < 4.8  # 16 of them
    away = x.T.numpy() - truth.mean
    errors = z_of(w[:, None] * (np.square(away) - np.diag(truth.covariance)), 0.0)
    assert np.abs(errors).max() < 4.8
