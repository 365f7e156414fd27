"""Resampling, best-of-N, FK steering, SVDD, tempered SMC, predictors: distributions, limits and published forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent.affine import AffineStep, propagate, reverse_kernel
from lightning_toys.mirror_descent.best_of_n import BestOfN, best_of_n_kl, best_of_n_mass
from lightning_toys.mirror_descent.chain_runner import run_chains
from lightning_toys.mirror_descent.closed_form_checks import closed_form_checks
from lightning_toys.mirror_descent.guidance import (
    DiffusionPosteriorSampling,
    GuidanceRule,
    HTransform,
    TrainingFreeGuidance,
    Unguided,
)
from lightning_toys.mirror_descent.joint import Gaussian, LinearGaussianJoint, gaussian_kl
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise
from lightning_toys.mirror_descent.mixture import Mixture
from lightning_toys.mirror_descent.predictors import Predictor
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.resampling import Multinomial, Resampling, Residual, Systematic
from lightning_toys.mirror_descent.reverse_process import ddim_step, ode_step
from lightning_toys.mirror_descent.rewards import QuadraticReward, Quartic, Step
from lightning_toys.mirror_descent.shipped import KNOWN
from lightning_toys.mirror_descent.steering import SVDD, Difference, FKSteering, Max, Sum
from lightning_toys.mirror_descent.tempered_smc import TemperedSMC
from lightning_toys.mirror_descent.tilt import Reward
from tests.mirror_descent.test_mixture import FOUR, PLANE, problem_of
from tests.mirror_descent.test_mixture_sampling import SMALL, checked, worst
from tests.mirror_descent.test_samplers import LIKE, PROBLEM, SKEW, with_settings

SINGLE = torch.zeros(())


# resampling


@pytest.mark.parametrize("kind", [Systematic, Residual, Multinomial])
def test_resampling_is_unbiased(kind: type[Resampling]) -> None:
    """Index i is kept N w_i times on average; residual and systematic never less than its whole part."""
    scheme, n, groups = kind(), 8, BLOCK_SIZE // 8
    w = torch.tensor([0.26, 0.03, 0.14, 0.2, 0.0, 0.125, 0.115, 0.13], dtype=torch.float64)
    noise = Noise([(0, 0)], f"test/{kind.__name__}", LIKE)
    kept = scheme.indices(w.expand(groups, n), scheme.uniforms(noise, groups, n))
    assert kept.shape == (groups, n)
    counts = torch.stack([(kept == i).sum(1) for i in range(n)], 1).double().numpy()
    want = n * w.numpy()
    spread = counts.std(0)
    assert (np.abs(counts.mean(0) - want) <= 4.5 * spread / math.sqrt(groups) + 1e-12).all()
    assert (counts[:, 4] == 0).all()
    if kind is Multinomial:
        variance = want * (1 - w.numpy())  # binomial
        np.testing.assert_allclose(counts.var(0), variance, rtol=0.08)
    else:
        assert (counts >= np.floor(want + 1e-12)).all()
        assert counts.var(0).sum() < 0.6 * (want * (1 - w.numpy())).sum()


def test_residual_of_even_weights_keeps_all() -> None:
    w = torch.full((3, 64), 1 / 64)
    kept = Residual().indices(w, torch.rand(3, 64, generator=torch.Generator().manual_seed(0)))
    assert (kept == torch.arange(64)).all()


# DDIM with noise


@pytest.mark.parametrize(("abar", "next_abar"), [(0.1, 0.4), (0.7, 0.95), (0.9, 1.0)])
def test_ddim_step(abar: float, next_abar: float) -> None:
    """At eta 0 it is DDIM's; at 1 the posterior q(x' | x, x_0) of DDPM by Bayes' rule; of exact scores one step keeps
    a standard normal a standard normal at any eta."""
    assert ddim_step(abar, next_abar, 0.0) == ode_step(abar, next_abar)
    step = ddim_step(abar, next_abar, 1.0)
    # equation 7 of Ho et al.: beta~ = (1 - abar') / (1 - abar) (1 - abar / abar')
    assert step.variance == pytest.approx((1 - next_abar) / (1 - abar) * (1 - abar / next_abar), abs=1e-15)
    x, x0 = 0.7, -0.4
    score = -(x - math.sqrt(abar) * x0) / (1 - abar)
    alpha = abar / next_abar
    mean = (math.sqrt(next_abar) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - next_abar) * x) / (1 - abar)
    assert step.x_scale * x + step.score_scale * score == pytest.approx(mean, abs=1e-12)
    for eta in (0.0, 0.5, 1.0):
        step = ddim_step(abar, next_abar, eta)
        # q' given x_0 has variance 1 - abar' whatever eta is: E over x of the step at the true x_0
        slope = step.x_scale - step.score_scale / (1 - abar)
        assert slope**2 * (1 - abar) + step.variance == pytest.approx(1 - next_abar, abs=1e-12)


def test_predictors_settings_are_exact_in_the_linear_gaussian_problem() -> None:
    problem = with_settings(SKEW, predictor_K=12)
    made: dict[str, Callable[[Problem], Predictor]] = {
        "ddim1_dps": KNOWN["ddim1_dps"],  # type: ignore[dict-item]
        "ddim0.4_tfg": lambda p: Predictor(p, "ddim", TrainingFreeGuidance, 0.4),
        "sde_dps_x1.7": lambda p: Predictor(p, "sde", DiffusionPosteriorSampling, scale=1.7),
        "ode_dps_recur3": lambda p: Predictor(p, "ode", DiffusionPosteriorSampling, recurrence=3),
        "sde_tfg_pc2": lambda p: Predictor(p, "sde", TrainingFreeGuidance, corrector_steps=2),
    }
    for name, make in made.items():
        assert make(problem).name == name
        checks = closed_form_checks(make(problem), run_chains(make(problem.centred), [0, 1], BLOCK_SIZE, SINGLE))
        assert {c.source for c in checks} == {"exact"}
        assert min(c.p_value(c.z) for c in checks) > 1e-4


@pytest.mark.parametrize("rule", [HTransform, Unguided])
def test_a_scale_without_effect_is_refused(rule: type[GuidanceRule]) -> None:
    with pytest.raises(ToyError, match=r"scale: 1\.7 is not allowed with the rule") as caught:
        Predictor(PROBLEM, "sde", rule, scale=1.7)
    assert len(str(caught.value).splitlines()) == 1
    assert Predictor(PROBLEM, "sde", rule, scale=1.0).name == f"sde_{rule.name}"


def test_correctors_mend_few_levels() -> None:
    """With the exact h-transform few levels leave an error that Langevin steps at each level reduce, exactly."""
    problem = with_settings(PROBLEM, predictor_K=20)

    def kl(**settings: int) -> float:
        x = Predictor(problem, "ode", HTransform, **settings).exact_distribution()  # type: ignore[arg-type]
        assert x is not None
        return gaussian_kl(x.m, x.C, problem.tilted_joint.m, problem.tilted_joint.C)

    assert kl(corrector_steps=4) < 0.5 * kl()
    cost = Predictor(problem, recurrence=2, corrector_steps=3).cost()
    assert (cost.score, cost.value) == (2 * 20 + 3 * 19, 2 * 20 + 3 * 19)


# best of N


def test_best_of_n_by_order_statistics() -> None:
    """With Q increasing the best of N standard normals has the density N Phi^(N - 1) phi."""
    grid = np.linspace(-8, 8, 4001)
    q = scipy_stats.norm.pdf(grid)
    q /= q.sum()
    found = best_of_n_mass(q, grid, 5)
    want = 5 * scipy_stats.norm.cdf(grid) ** 4 * scipy_stats.norm.pdf(grid) * (grid[1] - grid[0])
    np.testing.assert_allclose(found, want, atol=5e-6)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())


@pytest.mark.parametrize("n", [2, 8, 64])
def test_best_of_n_kl(n: int) -> None:
    """log n - (n - 1) / n where Q has no ties, whatever Q is; with a step it is a bound (Beirami et al., theorem 1)."""
    grid = np.linspace(-8, 8, 40_001)
    q = scipy_stats.norm.pdf(grid)
    q /= q.sum()
    for Q in (grid, -((grid - 0.7) ** 2), -((grid**2 - 1.1) ** 2)):
        assert kl(best_of_n_mass(q, Q, n), q) == pytest.approx(best_of_n_kl(n), abs=2e-3)
    step = kl(best_of_n_mass(q, (grid > 0.5).astype(float), n), q)
    p = float(q[grid > 0.5].sum())
    lost = (1 - p) ** n
    assert step == pytest.approx((1 - lost) * math.log((1 - lost) / p) + lost * math.log(lost / (1 - p)), abs=1e-9)
    assert step < best_of_n_kl(n)


@pytest.mark.parametrize("reward", [Quartic(0.8, 1.2, 0.2), Step(1.5, 0.3)], ids=["quartic", "step"])
def test_best_of_n_distribution(reward: Quartic | Step) -> None:
    problem = problem_of(PLANE, reward)
    checks = checked("best_of_8", problem)
    assert {c.source for c in checks} == {"exact"}
    assert worst(checks) > 1e-3
    assert max(abs(c.goal_z) for c in checks) > 10
    assert BestOfN(problem_of(FOUR, QuadraticReward([1.0, 1.0], [0.0, 0.0]))).exact_distribution_on_mixtures() is None


def test_best_of_n_of_narrow_modes_far_apart() -> None:
    """Modes at +-5000 of standard deviation 1: with a step in the right one's middle the best of N is a binomial's;
    under a symmetric reward with two jumps its mean is 0."""
    C = np.array([[[1.0, 0.3], [0.3, 1.0]]] * 2)
    q = Mixture(np.array([0.5, 0.5]), np.array([[-5000.0, 0.0], [5000.0, 0.0]]), C, 1)
    distribution = BestOfN(problem_of(q, Step(1.0, 5000.0)), 3).exact_distribution_on_mixtures()
    assert distribution is not None
    lost, half = 0.75**3, math.sqrt(2 / math.pi)
    assert distribution.mean_reward == pytest.approx(1 - lost, abs=1e-6)
    below = (0.5 * -5000 + 0.25 * (5000 - half)) / 0.75  # E of q left of the edge
    assert distribution.mean[0] == pytest.approx(lost * below + (1 - lost) * (5000 + half), abs=1e-3)
    assert distribution.weights[0] == pytest.approx(lost * 2 / 3, abs=1e-6)
    even = BestOfN(problem_of(q, Window()), 3).exact_distribution_on_mixtures()
    assert even is not None
    assert even.mean[0] == pytest.approx(0.0, abs=1e-3)
    p = 2 * scipy_stats.norm.cdf(0.25) - 1  # of either mode within its window
    assert even.mean_reward == pytest.approx(1 - (1 - p) ** 3, abs=1e-6)


class Window(Reward):
    """1 within 1/4 of -5000 and of 5000."""

    breakpoints = (-5000.25, -4999.75, 4999.75, 5000.25)

    def value(self, a: torch.Tensor) -> torch.Tensor:
        return ((a[0].abs() - 5000).abs() < 0.25).to(a)


def test_best_of_n_in_the_linear_gaussian_problem() -> None:
    checks = closed_form_checks(BestOfN(SKEW, 5), run_chains(BestOfN(SKEW.centred, 5), [0, 1], BLOCK_SIZE, SINGLE))
    assert {c.source for c in checks} == {"exact"}
    assert min(c.p_value(c.z) for c in checks) > 1e-4
    assert max(abs(c.goal_z) for c in checks) > 10


# particle methods


@pytest.mark.parametrize("potential", [Difference, Max, Sum])
def test_potentials_multiply_to_the_tilt(potential: type[Difference | Max | Sum]) -> None:
    """By their formulas on one path of rewards."""
    r = [torch.tensor([[v]], dtype=torch.float64) for v in (0.3, -0.2, 0.9, 0.1)]
    memory = potential().start(r[0])
    found = []
    for value in r:
        log_g, memory = potential().step(memory, value)
        found.append(float(log_g))
    want = {Difference: [0.3, -0.5, 1.1, -0.8], Max: [0.3, 0.3, 0.9, 0.9], Sum: [0.3, 0.1, 1.0, 1.1]}
    assert found == pytest.approx(want[potential], abs=1e-12)


@pytest.mark.parametrize("name", ["fk_max", "smc_tempered"])
def test_particles_on_a_mixture(name: str) -> None:
    """Exact as the particles grow, and unbiased in Z, under a reward that is no quadratic."""
    problem = problem_of(PLANE, Quartic(0.8, 1.2, 0.2), 1.0, **{**SMALL, "smc_K": 10})
    checks = checked(name, problem)
    assert worst(checks) > 1e-3, min(checks, key=lambda c: c.p_value(c.z))
    assert checks[-1].quantity == "Z / exact Z"


def test_sum_of_rewards_under_a_weak_tilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights even out as lambda falls, and it is at the limit then; under a strong tilt it is not tested."""
    monkeypatch.setattr(Sum, "near_limit", True)
    checks = checked("fk_sum", problem_of(PLANE, Quartic(0.8, 1.2, 0.2), 0.1, **{**SMALL, "smc_K": 6}))
    assert worst(checks) > 1e-3, min(checks, key=lambda c: c.p_value(c.z))
    assert checks[-1].quantity == "Z / exact Z"
    monkeypatch.setattr(Sum, "near_limit", False)
    assert not KNOWN["fk_sum"](PROBLEM).exact_in_the_limit


@pytest.mark.parametrize("name", ["fk_difference", "smc_tempered", "smc_twisted_residual"])
def test_particles_in_the_linear_gaussian_problem(name: str) -> None:
    problem = with_settings(SKEW, smc_particles=2**9, smc_K=12)
    samples = run_chains(KNOWN[name](problem.centred), [0, 1], BLOCK_SIZE, SINGLE)
    checks = closed_form_checks(KNOWN[name](problem), samples)
    assert min(c.p_value(c.z) for c in checks) > 1e-4, checks
    assert {c.source for c in checks} == {"limit", "exact"}


@pytest.mark.slow
def test_particles_resample() -> None:
    """On a mixture whose modes are reweighed they do; the sum of rewards resamples most."""
    problem = problem_of(FOUR, QuadraticReward([1.5, 2.5], [1.5, -1.5]), 2.0, **SMALL)
    count = {}
    for name in ("fk_difference", "fk_sum", "smc_tempered", "smc_twisted"):
        (sample,) = run_chains(KNOWN[name](problem), [0], BLOCK_SIZE, SINGLE)
        count[name] = float(np.mean(sample.extra["resampled"]))  # type: ignore[index]
    assert min(count.values()) >= 1
    assert count["fk_sum"] > count["fk_difference"]


def test_tempered_smc_without_moves_is_importance_sampling() -> None:
    """Weights then only depend on the first draw: no resampling at threshold 0, and log Z is its log mean weight."""
    problem = problem_of(PLANE, Quartic(), 1.0, **SMALL, ess_threshold=0.0)
    sampler = TemperedSMC(problem, moves=0)
    (sample,) = run_chains(sampler, [0], BLOCK_SIZE, LIKE)
    a = problem.model.draw_action(Noise([(0, 0)], "sampler/smc_tempered", LIKE), problem.joint.clean)
    log_w = problem.tilted.log_weight(a).view(-1, 2**9)
    want = torch.logsumexp(log_w, -1) - math.log(2**9)
    np.testing.assert_allclose(sample.extra["log_z"], want, atol=1e-10)  # type: ignore[index]
    assert not any(sample.extra["resampled"])  # type: ignore[index]


# SVDD


def svdd_limit(problem: Problem) -> Gaussian:
    """The exact distribution of SVDD as M grows, in the linear-Gaussian problem: each kernel tilted by DPS's twist."""
    sampler = SVDD(problem)
    rule = DiffusionPosteriorSampling(problem.joint, problem.reward, problem.lambda_scale)
    x: Gaussian = sampler.levels[0]
    for noisy, cleaner in zip(sampler.levels[:-1], sampler.levels[1:], strict=True):
        kernel = reverse_kernel(noisy, cleaner)
        G, g = rule.affine_term(cleaner, problem.lambda_scale)
        D = np.linalg.inv(np.linalg.inv(kernel.D) - G)
        K = D @ np.linalg.inv(kernel.D)
        x = propagate(x, AffineStep(K @ kernel.A, K @ kernel.b + D @ g, D))
    return x


def test_svdd_limits() -> None:
    """M = 1 is q itself; a large M tends to the chain of tilted kernels, which is not the target."""
    problem = with_settings(Problem(LinearGaussianJoint(0.0, 0.8, -0.7, 0.6), SKEW.reward, SKEW.schedule, 1.2), smc_K=8)
    clean, want = problem.linear_joint.clean, svdd_limit(problem)
    far = {}
    for m in (1, 2, 32):
        (sample,) = run_chains(SVDD(problem, m), [0], BLOCK_SIZE, SINGLE)
        x = np.stack([sample.a, sample.s], 1)
        exact = clean if m == 1 else want
        z = (x.mean(0) - exact.m) / np.sqrt(np.diag(exact.C) / len(x))
        spread = (x.var(0) / np.diag(exact.C) - 1) / math.sqrt(2 / len(x))
        far[m] = max(np.abs(z).max(), np.abs(spread).max())
    assert far[1] < 4.5
    assert far[32] < 0.2 * far[2]
    assert abs(want.m[0] - problem.target.mu) > 0.05
    greedy = SVDD(problem, 4, greedy=True)
    assert greedy.name == "svdd_greedy_4"
    (best,), (soft,) = (run_chains(s, [0], BLOCK_SIZE, SINGLE) for s in (greedy, SVDD(problem, 4)))
    Q = problem.target.Q
    assert np.mean(Q.b * best.a - 0.5 * Q.A * best.a**2) > np.mean(Q.b * soft.a - 0.5 * Q.A * soft.a**2)


def test_costs() -> None:
    problem = with_settings(PROBLEM, smc_K=10, smc_particles=2**9)
    assert FKSteering(problem).cost()._asdict() == {"prior": 1, "score": 10, "value": 11, "refresh": 0}
    assert SVDD(problem, 4).cost()._asdict() == {"prior": 1, "score": 1 + 4 * 9, "value": 40, "refresh": 0}
    assert TemperedSMC(problem, 3).cost()._asdict() == {"prior": 1, "score": 40, "value": 40, "refresh": 1}
    assert BestOfN(problem, 6).cost()._asdict() == {"prior": 6, "score": 0, "value": 6, "refresh": 1}
