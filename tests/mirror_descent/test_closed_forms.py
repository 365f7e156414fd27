"""mirror_descent's closed forms against autograd, quadrature and brute force, at parameters where nothing is zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy import stats as scipy_stats

from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent.affine import propagate, reverse_kernel
from lightning_toys.mirror_descent.guidance import DiffusionPosteriorSampling, HTransform, ProductOfExperts
from lightning_toys.mirror_descent.joint import Gaussian, LinearGaussianJoint, NoiseLevel, gaussian_kl, noised
from lightning_toys.mirror_descent.reverse_process import guided_steps, log_snr_levels, ode_step, sde_step
from lightning_toys.mirror_descent.schedules import (
    Constant,
    LateConstant,
    LateRamp,
    Linear,
    Schedule,
    SigmaPower,
    TFGPlusFinalMALA,
)
from lightning_toys.mirror_descent.shipped import RULES
from lightning_toys.mirror_descent.tilt import ActionValue, Reward, StateReward, tilt
from lightning_toys.training.noise import keyed_generator

DEFAULT = LinearGaussianJoint()


def random_joint(i: int) -> LinearGaussianJoint:
    g = keyed_generator(i, 0, "test/mirror/joint")
    mu_a, alpha, d, s, mu_eps = g.normal(size=5)
    sigma_a, sigma_sprime = np.exp(0.4 * g.normal(size=2))
    return LinearGaussianJoint(mu_a, sigma_a, alpha, sigma_sprime, d, s, mu_eps)


def random_reward(i: int) -> Reward:
    g = keyed_generator(i, 0, "test/mirror/reward")
    w, r = np.exp(g.normal(size=2)), g.normal(size=2)
    return StateReward(w[0], r[0], w[1], r[1]) if i % 2 else ActionValue(w[0], r[0])


def log_density(joint: LinearGaussianJoint, x: torch.Tensor) -> torch.Tensor:
    """log q(a, s') by its definition: of a, then of s' given a."""
    a, s = x[..., 0], x[..., 1]
    mean = joint.alpha * a + joint.d * joint.s + joint.mu_eps
    first = -0.5 * ((a - joint.mu_a) / joint.sigma_a) ** 2 - math.log(joint.sigma_a)
    second = -0.5 * ((s - mean) / joint.sigma_sprime) ** 2 - math.log(joint.sigma_sprime)
    return first + second - math.log(2 * math.pi)


# the joint distribution


@pytest.mark.parametrize("i", range(6))
def test_joint_matches_its_definition(i: int) -> None:
    joint = random_joint(i)
    x = torch.from_numpy(keyed_generator(i, 0, "test/x").normal(size=(20, 2)))
    normal = scipy_stats.multivariate_normal(joint.clean.m, joint.clean.C)
    np.testing.assert_allclose(normal.logpdf(x.numpy()), log_density(joint, x).numpy(), rtol=0, atol=1e-12 * 1e2)
    score = torch.func.vmap(torch.func.grad(lambda y: log_density(joint, y)))(x).numpy()
    clean = joint.clean
    np.testing.assert_allclose(-(x.numpy() - clean.m) @ clean.precision, score, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("i", range(6))
@pytest.mark.parametrize("abar", [0.05, 0.37, 0.9, 1.0])
def test_conditional_at_a_level(i: int, abar: float) -> None:
    """rho, c and v complete the square: log N(x; m, C) = log N(a) + log N(s'; rho a + c, v)."""
    level = random_joint(i).level(abar)
    x = keyed_generator(i, 1, "test/x").normal(size=(20, 2))
    both = scipy_stats.multivariate_normal(level.m, level.C).logpdf(x)
    first = scipy_stats.norm.logpdf(x[:, 0], level.m[0], math.sqrt(level.C[0, 0]))
    second = scipy_stats.norm.logpdf(x[:, 1], level.rho * x[:, 0] + level.c, math.sqrt(level.v))
    np.testing.assert_allclose(both, first + second, rtol=1e-12, atol=1e-12)


def test_noised_moments() -> None:
    """sqrt(abar) x + sqrt(1 - abar) eps, moment by moment; clean and pure noise at the ends."""
    joint = random_joint(1)
    for abar in (0.2, 0.7):
        level = joint.level(abar)
        np.testing.assert_allclose(level.m, math.sqrt(abar) * joint.clean.m, rtol=1e-12)
        np.testing.assert_allclose(level.C, abar * joint.clean.C + (1 - abar) * np.eye(2), rtol=1e-12)
    np.testing.assert_allclose(joint.level(1.0).C, joint.clean.C, rtol=1e-12)
    assert joint.clean.rho == pytest.approx(joint.alpha, rel=1e-12)
    assert joint.clean.v == pytest.approx(joint.sigma_sprime**2, rel=1e-12)
    assert joint.clean.c == pytest.approx(joint.d * joint.s + joint.mu_eps, rel=1e-12)


@pytest.mark.parametrize("i", range(4))
def test_gaussian_kl_matches_torch(i: int) -> None:
    g = keyed_generator(i, 0, "test/kl")
    roots = g.normal(size=(2, 2, 2))
    (p, q), (m, n) = (r @ r.T + 0.1 * np.eye(2) for r in roots), g.normal(size=(2, 2))
    normals = [
        torch.distributions.MultivariateNormal(torch.from_numpy(mean), torch.from_numpy(cov))
        for mean, cov in ((m, p), (n, q))
    ]
    assert gaussian_kl(m, p, n, q) == pytest.approx(float(torch.distributions.kl_divergence(*normals)), rel=1e-10)
    assert gaussian_kl(m, p, m, p) == pytest.approx(0, abs=1e-12)


# rewards and the tilt


@pytest.mark.parametrize("i", range(8))
@pytest.mark.parametrize("abar", [0.05, 0.6, 1.0])
def test_action_value_is_the_mean_reward(i: int, abar: float) -> None:
    """Q(a) = E[R(a, s') | a] by Gauss-Hermite quadrature, exact for quadratics."""
    level, reward = random_joint(i).level(abar), random_reward(i)
    Q = reward.action_value(level)
    z, w = np.polynomial.hermite_e.hermegauss(8)
    for a in (-1.3, 0.0, 0.8, 2.1):
        s = level.rho * a + level.c + math.sqrt(level.v) * z
        if isinstance(reward, StateReward):
            value = -0.5 * (reward.r_wa * (a - reward.r_a) ** 2 + reward.r_ws * (s - reward.r_s) ** 2)
        else:
            assert isinstance(reward, ActionValue)
            value = -0.5 * reward.q_a * (a - reward.mu_q) ** 2 + 0 * s
        assert Q(a) == pytest.approx(float((value * w).sum() / w.sum()), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("i", range(8))
def test_tilt_by_quadrature(i: int) -> None:
    """Mean, variance, normaliser and importance efficiency of q(a) exp(beta Q(a)), integrated numerically."""
    level, reward, beta = random_joint(i).level(0.8), random_reward(i), 0.7
    tilted = tilt(level, reward, beta)
    std = math.sqrt(level.C[0, 0])

    def weight(a: float, times: float) -> float:
        return float(scipy_stats.norm.pdf(a, level.m[0], std)) * math.exp(times * beta * tilted.Q(a))

    def mean(f: object, times: float = 1.0) -> float:
        low, high = tilted.mu - 14 / math.sqrt(tilted.tau), tilted.mu + 14 / math.sqrt(tilted.tau)
        return float(integrate.quad(lambda a: f(a) * weight(a, times), low, high, epsabs=0, epsrel=1e-12)[0])  # type: ignore[operator]

    z = mean(lambda a: 1.0)
    assert math.exp(tilted.log_z) == pytest.approx(z, rel=1e-10)
    assert tilted.mu == pytest.approx(mean(lambda a: a) / z, rel=1e-9, abs=1e-10)
    assert 1 / tilted.tau == pytest.approx(mean(lambda a: (a - tilted.mu) ** 2) / z, rel=1e-9)
    assert tilted.importance_ess_fraction == pytest.approx(z**2 / mean(lambda a: 1.0, 2.0), rel=1e-9)


def test_known_targets() -> None:
    """The defaults' numbers: N(.9, .4) for the action's value, N(.9375, .25) and s' ~ N(.9375, .5) for the state's."""
    by_action = tilt(DEFAULT.clean, ActionValue(), 1.5)
    assert (by_action.mu, by_action.tau) == pytest.approx((0.9, 2.5), rel=1e-12)
    assert by_action.importance_ess_fraction == pytest.approx(0.4822, abs=5e-5)
    by_state = tilt(DEFAULT.clean, StateReward(), 1.5)
    assert (by_state.mu, by_state.tau) == pytest.approx((0.9375, 4.0), rel=1e-12)
    assert by_state.importance_ess_fraction == pytest.approx(0.4003, abs=5e-5)
    joint = DEFAULT.with_action_marginal(by_state.mu, 1 / by_state.tau)
    assert (joint.m[1], joint.C[1, 1]) == pytest.approx((0.9375, 0.5), rel=1e-12)
    assert (joint.rho, joint.v) == pytest.approx((1.0, 0.25), rel=1e-12)  # s' | a is what it was


# schedules


def test_schedules() -> None:
    low = 0.05
    for abar in np.linspace(low, 1, 12):
        r = (abar - low) / (1 - low)
        assert Linear().fraction(abar, low) == pytest.approx(r, abs=1e-12)
        assert Constant().fraction(abar, low) == 1
        assert LateConstant(0.3, 0.8).fraction(abar, low) == float(0.3 <= abar <= 0.8)
        ramp = 0.0 if abar < 0.3 else 1.0 if abar > 0.8 else ((abar - 0.3) / 0.5) ** 3
        assert LateRamp(0.3, 0.8, 3.0).fraction(abar, low) == pytest.approx(ramp, abs=1e-12)
        assert TFGPlusFinalMALA(1.5).fraction(abar, low) == pytest.approx((1 - r) ** 1.5, abs=1e-12)
        assert SigmaPower(3.0).fraction(abar, low) == pytest.approx((1 - abar) ** 1.5, abs=1e-12)
    assert Linear().fraction(0.01, low) == 0  # clipped


@pytest.mark.parametrize(
    ("schedule", "full"),
    [(Linear(), True), (Constant(), True), (LateConstant(), True), (LateConstant(0.2, 0.9), False), (LateRamp(), True),
     (TFGPlusFinalMALA(), False), (SigmaPower(), False)],
)  # fmt: skip
def test_which_schedules_reach_the_target(schedule: Schedule, full: bool) -> None:
    assert schedule.reaches_target == full


def test_refusals() -> None:
    for make, says in [
        (lambda: LinearGaussianJoint(sigma_a=0.0), "--data.sigma_a: 0.0"),
        (lambda: LinearGaussianJoint(sigma_sprime=-1.0), "--data.sigma_sprime: -1.0"),
        (lambda: LateConstant(0.8, 0.3), "--model.schedule.w_lo, --model.schedule.w_hi: 0.8, 0.3"),
        (lambda: LateRamp(ramp_p=0.0), "--model.schedule.ramp_p: 0.0"),
        (lambda: ActionValue(q_a=-0.1), "--model.reward.q_a: -0.1"),
        (lambda: StateReward(-0.1, 1.0, 0.0, 1.0), "--model.reward.r_wa: -0.1"),
    ]:
        with pytest.raises(ToyError) as caught:
            make()
        assert says in str(caught.value)


# guidance


def guidance_term(
    rule: str, joint: LinearGaussianJoint, reward: Reward, level: NoiseLevel, beta: float, x: torch.Tensor
) -> torch.Tensor:
    G, g = RULES[rule](joint, reward, beta).affine_term(level, beta)
    return x @ torch.from_numpy(G).T + torch.from_numpy(g)


def tweedie(level: NoiseLevel, x: torch.Tensor) -> torch.Tensor:
    score = -(x - torch.from_numpy(level.m)) @ torch.from_numpy(level.precision)
    return (x + (1 - level.abar) * score) / math.sqrt(level.abar)


@pytest.mark.parametrize("i", range(4))
def test_rules_are_gradients(i: int) -> None:
    """Each rule's term is autograd's gradient of the energy that it documents."""
    joint, reward, beta, abar = random_joint(i), random_reward(i), 0.9, 0.4
    level = joint.level(abar)
    x = torch.from_numpy(keyed_generator(i, 2, "test/x").normal(size=(7, 2)))
    Q, Q0 = reward.action_value(level), reward.action_value(joint.clean)

    def smoothed(y: torch.Tensor) -> torch.Tensor:
        """log E exp(beta Q(a_0 + s z)) by quadrature, s^2 = 1 - abar."""
        z, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(80))
        a = tweedie(level, y)[0] + math.sqrt(1 - abar) * z
        return torch.logsumexp(beta * (Q0.b * a - 0.5 * Q0.A * a * a) + w.log(), 0)

    energies = {
        "none": lambda y: 0 * y.sum(),
        "poe": lambda y: beta * (Q.b * y[0] - 0.5 * Q.A * y[0] ** 2),
        "dps": lambda y: beta * (Q0.b * tweedie(level, y)[0] - 0.5 * Q0.A * tweedie(level, y)[0] ** 2),
        "tfg": smoothed,
    }
    for rule, energy in energies.items():
        wanted = torch.stack([torch.func.jacrev(energy)(y) for y in x])
        torch.testing.assert_close(guidance_term(rule, joint, reward, level, beta, x), wanted, rtol=1e-8, atol=1e-8)
        # where the schedule's beta is below lambda, a fraction of it
        G, g = RULES[rule](joint, reward, beta).affine_term(level, 0.3 * beta)
        less = x @ torch.from_numpy(G).T + torch.from_numpy(g)
        torch.testing.assert_close(less, 0.3 * wanted, rtol=1e-8, atol=1e-8)


def test_h_transform_is_the_score_of_the_noised_target() -> None:
    joint, reward, beta = random_joint(3), random_reward(3), 0.9
    level, tilted = joint.level(0.3), tilt(joint.clean, reward, beta)
    target = noised(joint.with_action_marginal(tilted.mu, 1 / tilted.tau), 0.3)
    x = torch.from_numpy(keyed_generator(3, 2, "test/x").normal(size=(7, 2)))
    score = -(x - torch.from_numpy(level.m)) @ torch.from_numpy(level.precision)
    wanted = -(x - torch.from_numpy(target.m)) @ torch.from_numpy(target.precision)
    torch.testing.assert_close(score + guidance_term("h_transform", joint, reward, level, beta, x), wanted)


# reverse processes


def final_distribution(rule: str, K: int, step: object, beta: object, joint: LinearGaussianJoint = DEFAULT) -> Gaussian:
    reward = StateReward()
    abars = log_snr_levels(K)
    x: Gaussian = joint.level(float(abars[0]))
    guide = RULES[rule](joint, reward, 1.5)
    for affine_step in guided_steps(joint, guide, beta, abars.tolist(), step):  # type: ignore[arg-type]
        x = propagate(x, affine_step)
    return x


def kl_to_target(x: Gaussian) -> float:
    target = DEFAULT.with_action_marginal(0.9375, 0.25)
    return gaussian_kl(x.m, x.C, target.m, target.C)


TABLE = [  # rule, process, beta, mean, variance, slope, conditional ratio, joint KL: measured elsewhere at K = 4000
    ("poe", sde_step, "linear", 0.844, 0.275, 1.39, 1.05, 0.245),
    ("poe", sde_step, "constant", 1.057, 0.219, 1.39, 1.06, 0.157),
    ("dps", sde_step, "constant", 1.188, 0.166, 0.85, 0.94, 0.196),
    ("poe", ode_step, "linear", 0.777, 0.254, 1.80, 0.53, 0.837),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r[0]} {r[1].__name__} {r[2]}")
def test_guidance_table(row: tuple[object, ...]) -> None:
    rule, step, kind, *wanted = row
    beta = (lambda abar: 1.5 * abar) if kind == "linear" else (lambda abar: 1.5)
    x = final_distribution(str(rule), 4000, step, beta)
    found = [x.m[0], x.C[0, 0], x.rho, x.v / 0.25, kl_to_target(x)]
    np.testing.assert_allclose(found, wanted, atol=5.1e-3, rtol=0)
    assert kl_to_target(x) > 0.1  # none of them reaches the target


def test_h_transform_reaches_the_target() -> None:
    constant = lambda abar: 1.5  # noqa: E731
    kls = [kl_to_target(final_distribution("h_transform", K, sde_step, constant)) for K in (40, 200, 4000)]
    assert kls[0] > 10 * kls[1] > 100 * kls[2]
    assert kls[2] < 1e-5
    # the bias of a discretised diffusion is of first order, its KL of second
    assert 1.8 < math.log(kls[1] / kls[2]) / math.log(4000 / 200) < 2.2


def test_unguided_processes_return_the_joint() -> None:
    for step in (sde_step, ode_step):
        errors = []
        for K in (200, 400):
            x = final_distribution("none", K, step, lambda abar: 0.0, random_joint(2))
            clean = random_joint(2).clean
            errors.append(gaussian_kl(x.m, x.C, clean.m, clean.C))
        assert errors[1] < 1e-3
        assert 3 < errors[0] / errors[1] < 5


def test_reverse_kernel_undoes_noising() -> None:
    """low = g high + noise; then high | low by the posterior: the joint distribution of both is recovered."""
    joint = random_joint(4)
    low, high = joint.level(0.2), joint.level(0.7)
    kernel = reverse_kernel(low, high)
    g = math.sqrt(0.2 / 0.7)
    np.testing.assert_allclose(kernel.A @ low.m + kernel.b, high.m, rtol=1e-12)
    np.testing.assert_allclose(kernel.A @ low.C @ kernel.A.T + kernel.D, high.C, rtol=1e-11)
    np.testing.assert_allclose(kernel.A @ low.C, g * high.C, rtol=1e-11)  # the covariance of the two
    np.testing.assert_allclose(low.C, g**2 * high.C + (1 - g**2) * np.eye(2), rtol=1e-12)


def test_affine_terms_are_symmetric() -> None:
    for kind in (ProductOfExperts, DiffusionPosteriorSampling, HTransform):
        G, g = kind(DEFAULT, StateReward(), 1.5).affine_term(DEFAULT.level(0.5), 1.0)
        assert G.shape == (2, 2)
        assert g.shape == (2,)
        np.testing.assert_allclose(G, G.T, atol=1e-12)  # gradients
