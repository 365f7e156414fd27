"""Kernels and samplers: detailed balance, exact distributions by propagation, unbiased Z, and negative controls."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from lightning_toys.mirror_descent import chain_runner
from lightning_toys.mirror_descent.annealed import PCMALA, PCULA
from lightning_toys.mirror_descent.chain_runner import run_chains
from lightning_toys.mirror_descent.closed_form_checks import closed_form_checks, detectable_error, off_target_warning
from lightning_toys.mirror_descent.diagnostics import (
    Sample,
    distribution_metrics,
    histogram_kl,
    ks_p_values,
    lag_one_autocorrelation,
    mixing_metrics,
    residual,
    wasserstein,
)
from lightning_toys.mirror_descent.joint import LinearGaussianJoint, gaussian_kl
from lightning_toys.mirror_descent.kernels import (
    BLOCK_SIZE,
    Noise,
    gaussian_target,
    init_state,
    mala,
    mala_transition_matrix,
    ula,
)
from lightning_toys.mirror_descent.model import LearnedModel
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.resampling import systematic_resampling
from lightning_toys.mirror_descent.schedules import LateConstant, LateRamp, Linear, SigmaPower, TFGPlusFinalMALA
from lightning_toys.mirror_descent.shipped import SHORT_NAMES as SAMPLERS
from lightning_toys.mirror_descent.tilt import ActionValue, StateReward
from lightning_toys.training.noise import keyed_generator

LIKE = torch.zeros((), dtype=torch.float64)
PROBLEM = Problem(LinearGaussianJoint(), StateReward(), Linear(), 1.5)
BY_ACTION = Problem(
    LinearGaussianJoint(0.2, 1.3, 0.0, 0.8), ActionValue(0.6, -0.7), Linear(), 0.9
)  # an action that does nothing
SKEW = Problem(
    LinearGaussianJoint(0.3, 0.8, -0.7, 0.6, 0.5, 1.2, -0.4), StateReward(0.7, 1.0, 1.3, -0.5), Linear(), 1.2
)


def with_settings(problem: Problem = PROBLEM, **settings: object) -> Problem:
    return dataclasses.replace(problem, settings=dataclasses.replace(problem.settings, **settings))  # type: ignore[arg-type]


# noise


def test_noise_is_normal_and_uniform() -> None:
    noise = Noise([(0, 0)], "test", LIKE)
    z, u = noise.normal(4).ravel().numpy(), noise.uniform(4).ravel().numpy()
    assert scipy_stats.kstest(z, "norm").pvalue > 1e-3
    assert scipy_stats.kstest(u, "uniform").pvalue > 1e-3
    assert u.min() >= 0
    # no memory between the halves of Box and Muller's pairs, nor between rows
    a = Noise([(1, 0)], "test", LIKE).normal(2)
    pairs = [(a[0, : BLOCK_SIZE // 2], a[0, BLOCK_SIZE // 2 :]), (a[0], a[1])]
    for x, y in pairs:
        for f, g in ((x, y), (x.square(), y.square())):
            assert abs(np.corrcoef(f, g)[0, 1]) < 4.5 / math.sqrt(len(x))


def test_noise_is_a_function_of_its_key() -> None:
    first = Noise([(3, 5)], "a", LIKE).normal()
    assert torch.equal(first, Noise([(3, 5)], "a", LIKE).normal())
    for other in (Noise([(4, 5)], "a", LIKE), Noise([(3, 6)], "a", LIKE), Noise([(3, 5)], "b", LIKE)):
        assert not torch.equal(first, other.normal())
    single = Noise([(3, 5)], "a", torch.zeros(())).normal(8)
    assert single.dtype == torch.float32
    assert single.isfinite().all()


@pytest.mark.parametrize("name", ["pc_mala", "gibbs", "sde_poe", "smc_twisted", "importance"])
def test_chains_do_not_depend_on_their_number(name: str) -> None:
    """Nor on the other seeds."""
    sampler = SAMPLERS[name](with_settings(mcmc_steps=4, K=4, predictor_K=8, smc_K=5, smc_particles=2**10))
    few, many = (run_chains(sampler, [7, 2], n, LIKE) for n in (500, 2 * BLOCK_SIZE + 10))
    for a, b in zip(few, many, strict=True):
        assert np.array_equal(a.a, b.a[:500])
        assert np.array_equal(a.s, b.s[:500])
        assert len(b.a) == 2 * BLOCK_SIZE + 10
    solo = run_chains(sampler, [2], 500, LIKE)[0]
    assert np.array_equal(solo.a, few[1].a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SAMPLERS)
def test_blocks_drawn_together(name: str, dtype: torch.dtype) -> None:
    """As a GPU draws them: everything that is kept of each block is what it is alone, bit for bit."""
    sampler = SAMPLERS[name](with_settings(mcmc_steps=4, K=4, predictor_K=8, smc_K=5, smc_particles=2**10))
    like = torch.zeros((), dtype=dtype)
    keys = [(7, 0), (7, 1), (2, 0), (2, 1), (2, 2)]
    alone = [block for key in keys for block in chain_runner.draw_blocks(sampler, [key], like)]
    for one, two in zip(alone, chain_runner.draw_blocks(sampler, keys, like), strict=True):
        assert one.keys() == two.keys()
        for k, v in one.items():
            assert v == two[k] if k == "extra" else np.array_equal(v, two[k]), k
    assert not np.array_equal(alone[0]["a"], alone[1]["a"])
    few, many = (run_chains(sampler, [7, 2], 2 * BLOCK_SIZE + 10, like, max_blocks=k) for k in (1, 4))
    for a, b in zip(few, many, strict=True):
        assert np.array_equal(a.a, b.a)
        assert np.array_equal(a.s, b.s)
        assert (a.accepted, a.squared_jump, a.extra) == (b.accepted, b.squared_jump, b.extra)


def test_out_of_memory_halves_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws; what one block takes is not there either: an error."""
    sampler = SAMPLERS["pc_mala"](with_settings(K=4))
    wanted, draw, sizes = run_chains(sampler, [7, 2], 3 * BLOCK_SIZE, LIKE), chain_runner.draw_blocks, []

    def draw_blocks(sampler: Any, keys: Any, like: torch.Tensor, compiled: bool) -> Any:
        sizes.append(len(keys))
        if len(keys) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(sampler, keys, like, compiled)

    monkeypatch.setattr(chain_runner, "draw_blocks", draw_blocks)
    most, counts = 2, []
    found = run_chains(sampler, [7, 2], 3 * BLOCK_SIZE, LIKE, max_blocks=5, on_progress=counts.append)
    assert (sizes, counts) == ([5, 2, 2, 2], [2, 2, 2])
    for a, b in zip(wanted, found, strict=True):
        assert np.array_equal(a.a, b.a)
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        run_chains(sampler, [7], BLOCK_SIZE, LIKE)


def test_blocks_at_once() -> None:
    exact = SAMPLERS["pc_mala"](with_settings())
    gpu = torch.zeros((), device="meta")

    class There:
        device = torch.device("cuda")

    assert chain_runner.blocks_at_once(exact, LIKE) == chain_runner.blocks_at_once(exact, gpu) == 1
    assert chain_runner.blocks_at_once(exact, There()) == chain_runner.GPU_BLOCKS  # type: ignore[arg-type]
    assert chain_runner.blocks_at_once(SAMPLERS["pc_mala"](with_settings(compile=True)), There()) == 1  # type: ignore[arg-type]
    learned = SAMPLERS["pc_mala"](dataclasses.replace(with_settings(), model=LearnedModel(None)))  # type: ignore[arg-type]
    assert chain_runner.blocks_at_once(learned, There()) == chain_runner.GPU_BLOCKS_LEARNED  # type: ignore[arg-type]


# kernels


def skewed(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A log density with a long right tail, and its derivative: a Gaussian hides errors of sign."""
    return x - np.exp(x) - 0.1 * x**2, 1 - np.exp(x) - 0.2 * x


@pytest.mark.parametrize("kind", ["gaussian", "skewed"])
def test_detailed_balance(kind: str) -> None:
    grid = np.linspace(-6, 3, 301)
    log_p, grad = skewed(grid) if kind == "skewed" else (-2 * (grid - 0.4) ** 2, -4 * (grid - 0.4))
    P = mala_transition_matrix(grid, log_p, grad, 0.15)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    flow = p[:, None] * P
    assert np.abs(flow - flow.T).max() < 1e-14
    np.testing.assert_allclose(P.sum(1), 1, atol=1e-12)
    assert P.min() >= 0
    # an unadjusted chain is not in balance
    h = grid[1] - grid[0]
    Q = np.exp(-((grid[None] - (grid + 0.15 * grad)[:, None]) ** 2) / 0.6) * h / math.sqrt(4 * math.pi * 0.15)
    assert np.abs(p[:, None] * Q - (p[:, None] * Q).T).max() > 1e-6


def torch_skewed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (x - x.exp() - 0.1 * x.square())[0], 1 - x.exp() - 0.2 * x


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_mala_kernel_matches_its_transition_matrix(sign: float) -> None:
    """One step of many chains from one place lands as the matrix says; a wrong sign in the drift does not."""
    eta, x0 = 0.3, -1.0
    grid = np.linspace(-7, 4, 1101)
    at = int(np.abs(grid - x0).argmin())
    P = mala_transition_matrix(grid, *skewed(grid), eta)
    x0 = float(grid[at])
    state = init_state(torch.full((1, 4 * BLOCK_SIZE), x0, dtype=torch.float64), torch_skewed)
    state = state._replace(grad=sign * state.grad)

    noise = Noise([(0, 0)], "test/mala", LIKE)
    parts = []
    for k in range(4):
        piece = type(state)(*(v[..., k * BLOCK_SIZE : (k + 1) * BLOCK_SIZE] for v in state))
        parts.append(mala(noise, piece, torch_skewed, eta))
    x = torch.cat([p[0].x[0] for p in parts]).numpy()
    accepted = torch.cat([p[1].accepted for p in parts]).numpy().astype(bool)
    assert np.array_equal(x != x0, accepted)
    moved = P[at].copy()
    moved[at] = (moved[at - 1] + moved[at + 1]) / 2  # the diagonal holds rejections too
    n, rate = len(x), moved.sum()
    assert (abs(accepted.mean() - rate) < 5 * math.sqrt(rate / n)) == (sign > 0)
    if sign > 0:
        edges = np.linspace(-3, 2, 26) + (grid[1] - grid[0]) / 2  # between the grid's points
        found = np.histogram(x[accepted], edges)[0]
        wanted = np.histogram(grid, edges, weights=moved)[0] * n
        kept = wanted > 20
        assert (((found - wanted) ** 2 / wanted)[kept]).sum() < scipy_stats.chi2.ppf(1 - 1e-4, kept.sum())


def test_mala_leaves_a_skewed_target_invariant() -> None:
    """Started in the target, ten steps leave it there; without the correction they do not."""
    grid = np.linspace(-8, 4, 20001)
    p = np.exp(skewed(grid)[0])
    cdf = np.cumsum(p) / p.sum()
    u = keyed_generator(0, 0, "test/skewed").random(BLOCK_SIZE)
    x = torch.from_numpy(np.interp(u, cdf, grid)).unsqueeze(0)
    noise, state, unadjusted = Noise([(0, 0)], "test/keep", LIKE), init_state(x, torch_skewed), x
    for _ in range(10):
        state, _ = mala(noise, state, torch_skewed, 0.4)
        unadjusted = ula(noise, unadjusted, torch_skewed(unadjusted)[1], 0.4)
    to_uniform = lambda v: np.interp(v, grid, cdf)  # noqa: E731
    assert scipy_stats.kstest(to_uniform(state.x[0].numpy()), "uniform").pvalue > 1e-3
    assert scipy_stats.kstest(to_uniform(unadjusted[0].numpy()), "uniform").pvalue < 1e-6


def test_ula_stationary_variance() -> None:
    """(1 / tau) / (1 - eta tau / 2), which is not 1 / tau."""
    for eta in (0.05, 0.2):
        x = SAMPLERS["ula"](with_settings(ula_step=eta, mcmc_steps=400)).exact_distribution()
        assert x is not None
        assert x.C[0, 0] == pytest.approx(0.25 / (1 - eta * 4 / 2), rel=1e-9)
        assert x.m[0] == pytest.approx(0.9375, rel=1e-9)


def test_systematic_resampling() -> None:
    """Index i is kept floor or ceil of N w_i times, N w_i on average over the uniform, group by group."""
    w = torch.tensor([[0.1, 0.37, 0.0, 0.53], [0.25, 0.25, 0.1, 0.4]], dtype=torch.float64)
    for group in range(2):
        uniforms = torch.full((2, 50), 0.9)
        uniforms[group] = (torch.arange(50) + 0.5) / 50
        kept = torch.stack([systematic_resampling(w, u)[group] for u in uniforms.T])
        counts = torch.stack([torch.bincount(row, minlength=4) for row in kept]).double()
        assert ((counts - 4 * w[group]).abs() < 1).all()
        torch.testing.assert_close(counts.mean(0), 4 * w[group], atol=0.02, rtol=0)
    assert systematic_resampling(w, torch.ones(2)).max() == 3


# exact distributions


def test_pc_ula_exact_distribution() -> None:
    """Known numbers at K = 40, eta = .08 with one step a level and with ten, 20 particles."""
    one, ten = (
        PCULA(problem).exact_distribution()
        for problem in (PROBLEM, with_settings(action_steps_per_level=10, refresh_L=10))
    )
    assert one is not None
    assert ten is not None
    assert (one.m[0], one.C[0, 0]) == pytest.approx((0.934146, 0.306797), abs=6e-7)
    assert (ten.m[0], ten.C[0, 0]) == pytest.approx((0.937535, 0.297958), abs=6e-7)


def test_pc_mala_density() -> None:
    """Known numbers: mean .93806, variance .25210, KL 1.9e-5 with one step a level; 5.5e-11 with five."""
    found = PCMALA(PROBLEM).exact_moments()
    assert (found["mean"], found["var"]) == pytest.approx((0.93806, 0.25210), abs=6e-6)
    for steps, wanted in ((1, 1.9e-5), (5, 5.5e-11)):
        grid, p = PCMALA(with_settings(action_steps_per_level=steps)).density_within(40.0).solve()
        q = scipy_stats.norm.pdf(grid, 0.9375, 0.5)
        kept = p > 1e-200
        kl = (p[kept] * np.log(p[kept] / q[kept])).sum() * (grid[1] - grid[0])
        assert kl == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("problem", [PROBLEM, SKEW, BY_ACTION], ids=["default", "skew", "by action"])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samples_match_closed_forms(name: str, problem: Problem) -> None:
    """p > 7e-6 for every closed form (|z| < 4.5 where the error is known), in single precision.

    So many chains that an error of 2 % of a variance would be found with 95 %, at the run's own level of significance.
    """
    small = with_settings(problem, predictor_K=40, mcmc_steps=60, smc_particles=2**10, smc_K=10)
    sampler, blocks = SAMPLERS[name](small), 6 if name == "importance" else 3
    samples = run_chains(SAMPLERS[name](small.centred), [0, 1], blocks * BLOCK_SIZE, torch.zeros(()))
    checks = closed_form_checks(sampler, samples)
    assert len(checks) >= 4
    for check in checks:
        assert check.p_value(check.z) > 7e-6, check
    var = next(c for c in checks if c.quantity == "var")
    assert detectable_error(var, 80) < 0.02 * var.exact


def test_gibbs_autocorrelation() -> None:
    """(alpha^2 / ss^2) / (tau + alpha^2 / ss^2): .615 at tau = 2.5."""
    problem = dataclasses.replace(PROBLEM, reward=ActionValue())
    sampler = SAMPLERS["gibbs"](with_settings(problem, mcmc_steps=400))
    found = lag_one_autocorrelation(run_chains(sampler, [0], 500, LIKE)[0].trace)  # type: ignore[arg-type]
    assert np.mean(found) == pytest.approx(4 / 6.5, abs=4 * np.std(found, ddof=1) / 8)
    # the spread over chains is that of the estimate: many short runs of AR(1)
    z = keyed_generator(0, 0, "test/ar").standard_normal((200, 64 * 60))
    x = np.zeros_like(z)
    for t in range(1, 200):
        x[t] = 0.5 * x[t - 1] + z[t]
    runs = [lag_one_autocorrelation(part) for part in np.split(x, 60, axis=1)]
    claimed = np.mean([np.std(r, ddof=1) / 8 for r in runs])
    assert claimed == pytest.approx(np.std([np.mean(r) for r in runs], ddof=1), rel=0.3)


@pytest.mark.parametrize("particles", [2**6, 2**10])
@pytest.mark.parametrize("twist", ["dps", "tfg"])
def test_smc_is_unbiased_in_z(twist: str, particles: int) -> None:
    """Over independent runs, at few particles too; a twist that is left out of the weights is not."""
    sampler = SAMPLERS["smc_twisted"](with_settings(smc_K=8, smc_particles=particles, smc_twist=twist))
    truth = PROBLEM.target.log_z
    drawn = [sampler.draw(Noise([(s, 0)], "test/z", LIKE)).extra for s in range(12)]
    z = np.exp(np.concatenate([x["log_z"] for x in drawn]) - truth)  # type: ignore[index]
    assert len(z) == 12 * BLOCK_SIZE // particles
    assert abs(z.mean() - 1) < 4 * z.std(ddof=1) / math.sqrt(len(z))
    # without the twist in the weights it is the untilted distribution's Z, 1, however the particles are guided
    sampler.log_twist_at_zero = lambda k: 0.0  # type: ignore[attr-defined]
    sampler.log_twist = lambda k, x: 0 * x[0]  # type: ignore[attr-defined]
    sampler.twist_gradients = [(0.3 * G, 0.3 * g) for G, g in sampler.twist_gradients]  # type: ignore[attr-defined]  # lighter tails
    untwisted = np.exp(
        np.concatenate([sampler.draw(Noise([(s, 0)], "test/z", LIKE)).extra["log_z"] for s in range(12)])
    )  # type: ignore[index]
    assert abs(untwisted.mean() - 1) < 4 * untwisted.std(ddof=1) / math.sqrt(len(untwisted))
    assert abs(math.exp(truth) - 1) > 0.5


def test_smoothed_twist_reduces_weight_variance() -> None:
    """With DPS's twist more particles hardly help; with the smoothed one the mean is known to .02 of a deviation."""
    spread = {}
    for twist in ("dps", "tfg"):
        sampler = SAMPLERS["smc_twisted"](with_settings(smc_particles=2**12, smc_twist=twist))
        found = run_chains(sampler, [0, 1], BLOCK_SIZE, LIKE)
        means = np.concatenate([x.a.reshape(-1, 2**12).mean(1) for x in found])
        spread[twist] = means.std(ddof=1)
        if twist == "tfg":
            assert abs(means.mean() - 0.9375) < 4.5 * means.std(ddof=1) / 4
            assert min(found[0].extra["ess_fraction"]) > 0.85  # type: ignore[index]
    assert spread["tfg"] < 0.02 < spread["dps"]


# negative controls


def metrics(name: str, problem: Problem, chains: int = BLOCK_SIZE) -> dict[str, float]:
    (sample,) = run_chains(SAMPLERS[name](problem), [0], chains, LIKE)
    return distribution_metrics(problem, sample, 40) | ks_p_values(problem, sample)


def test_action_density_covers_a_far_prior() -> None:
    """The grid covers every level's distribution on the way from mu_a to the target."""
    far = Problem(LinearGaussianJoint(mu_a=30.0), StateReward(), LateConstant(), 1.5, Settings(K=12))
    wide, narrow = (moments_by_grid(far, half_width) for half_width in (12.0, 7.0))
    assert wide == pytest.approx(narrow, abs=1e-6)


def moments_by_grid(problem: Problem, half_width: float) -> tuple[float, float]:
    grid, p = PCMALA(problem).density_within(half_width=half_width).solve()
    h = grid[1] - grid[0]
    mean = float((grid * p).sum() * h)
    return mean, float(((grid - mean) ** 2 * p).sum() * h)


def test_coarse_grid_is_refused() -> None:
    grid = np.linspace(-5, 5, 11)
    with pytest.raises(ValueError, match="too coarse"):
        mala_transition_matrix(grid, -0.5 * grid**2, -grid, 0.01)


def test_conditional_invariance() -> None:
    """Residuals of s' given a are standard normal for a correct sampler, not where guidance leaks into s'."""
    right, wrong = metrics("pc_mala", PROBLEM), metrics("sde_poe", PROBLEM)
    assert right["residual_ks_p"] > 1e-3
    assert abs(right["residual_corr"]) < 5 / math.sqrt(BLOCK_SIZE)
    assert wrong["residual_ks_p"] < 1e-6
    assert abs(wrong["residual_corr"]) > 0.1


def test_negative_controls_fail() -> None:
    fine = metrics("mala", PROBLEM)
    assert fine["action_ks_p"] > 1e-3
    assert metrics("ula", with_settings(ula_step=0.2))["action_ks_p"] < 1e-6
    no_refresh = with_settings(refresh_L=0, final_refresh=False)
    stale = metrics("pc_joint_mala", no_refresh)
    assert stale["cond_ratio"] > 1.2
    assert stale["residual_ks_p"] < 1e-6
    off = dataclasses.replace(PROBLEM, schedule=SigmaPower())
    assert metrics("pc_mala", off)["action_kl"] > 0.5
    assert metrics("sde_poe", PROBLEM)["joint_kl"] > 0.1


def test_schedules_that_miss_the_target_warn() -> None:
    for schedule in (SigmaPower(), TFGPlusFinalMALA(final_steps=1), LateConstant(0.2, 0.9)):
        warning = off_target_warning(dataclasses.replace(PROBLEM, schedule=schedule))
        assert "does not end at the target N(0.938, 0.250)" in warning
        assert "pc_mala ends at mean" in warning
    slow = with_settings(dataclasses.replace(PROBLEM, schedule=TFGPlusFinalMALA(final_steps=20)), mala_step=0.05)
    assert "pc_mala ends" in off_target_warning(slow)  # many steps, but short ones
    corrected = dataclasses.replace(PROBLEM, schedule=TFGPlusFinalMALA())
    assert off_target_warning(corrected) == ""
    joint = metrics("pc_joint_mala", with_settings(corrected, final_refresh=False))
    assert joint["cond_ratio"] == pytest.approx(1, abs=0.06)  # the action has moved: s' is drawn again
    assert metrics("pc_mala", corrected)["action_kl"] < 1e-3
    for schedule in (LateConstant(), LateRamp()):
        problem = with_settings(dataclasses.replace(PROBLEM, schedule=schedule), action_steps_per_level=3)
        assert metrics("pc_mala", problem)["action_kl"] < 1e-3


# metrics


def test_metrics_against_closed_forms() -> None:
    n = 40_000
    z = keyed_generator(0, 0, "test/measures").standard_normal((2, n))
    target = PROBLEM.tilted_joint
    a = target.m[0] + 0.5 * z[0]
    sample = Sample(a, a + 0.5 * z[1])
    found = distribution_metrics(PROBLEM, sample, 50)
    assert found["joint_kl"] < 5 * 2.5 / n
    assert found["action_kl_hist"] == pytest.approx(49 / (2 * n), rel=0.6)  # the estimator's floor
    assert found["residual_var"] == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    np.testing.assert_allclose(residual(PROBLEM, sample), z[1], atol=1e-12)
    shifted = distribution_metrics(PROBLEM, Sample(a + 0.2, sample.s + 0.2), 50)
    assert shifted["action_w1"] == pytest.approx(0.2, abs=0.005)
    assert shifted["action_kl"] == pytest.approx(0.2**2 / (2 * 0.25), abs=0.01)
    assert shifted["action_kl_hist"] == pytest.approx(0.08, abs=0.01)
    assert wasserstein(scipy_stats.norm.ppf((np.arange(9) + 0.5) / 9), 0, 1) == pytest.approx(0, abs=1e-12)
    assert histogram_kl(np.full(10, 0.3), 0, 1, 8) == pytest.approx(math.log(8))
    assert gaussian_kl(0.0, 2.0, 0.0, 1.0) == pytest.approx(0.5 * (1 - math.log(2)))


def test_mixing_of_independent_and_of_stuck_chains() -> None:
    z = keyed_generator(0, 0, "test/mixing").standard_normal((400, 16))
    free = mixing_metrics(Sample(z[0], z[0], trace=z), True)
    assert free["rhat"] < 1.01
    assert free["ess_per_step"] == pytest.approx(1, abs=0.15)
    stuck = mixing_metrics(Sample(z[0], z[0], trace=z + 3 * np.arange(16)), True)
    assert stuck["rhat"] > 2
    assert mixing_metrics(Sample(z[0], z[0], trace=z), False) == {}


def test_costs() -> None:
    """Draws of q(a), evaluations of the score and of Q, draws of s' | a; MALA's against a counter."""
    problem = with_settings(
        K=7, action_steps_per_level=3, refresh_L=2, mcmc_steps=11, particles=5, predictor_K=9, smc_K=6
    )
    costs = {name: SAMPLERS[name](problem).cost() for name in SAMPLERS}
    assert costs["mala"] == (1, 12, 12, 1)
    assert costs["ula"] == (1, 11, 11, 1)
    assert costs["independence_mh"] == (12, 0, 12, 1)
    assert costs["gibbs"] == (1, 11, 11, 12)
    assert costs["pc_mala"] == (1, 7 * 4, 7 * 4, 1)
    assert costs["pc_joint_mala"] == (1, 7 * 5, 7 * 5, 7 * 2 + 1)
    assert costs["pc_ula"] == (1, 7 * 3, 7 * 3, 7 * 2 * 5 + 1)
    still = with_settings(problem, refresh_L=0)
    assert SAMPLERS["pc_joint_mala"](still).cost() == (1, 7 * 4, 7 * 4, 1 + 1)
    assert SAMPLERS["pc_ula"](still).cost() == (1, 7 * 3, 7 * 3, 5 + 1)
    assert costs["sde_poe"] == (1, 9, 9, 0)
    assert costs["ode_none"] == (1, 9, 0, 0)
    assert costs["smc_twisted"] == (1, 7, 7, 0)
    assert costs["importance"] == (1, 0, 1, 1)
    calls = 0
    target = gaussian_target(0.0, 1.0)

    def counted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        return target(x)

    state = init_state(torch.zeros(1, BLOCK_SIZE), counted)
    for _ in range(11):
        state, _ = mala(Noise([(0, 0)], "test", torch.zeros(())), state, counted, 0.5)
    assert calls == costs["mala"].score


def test_one_level() -> None:
    assert len(with_settings(K=1).levels) == 1
    assert with_settings(K=1).levels[0].mu == pytest.approx(0.9375)
    assert Settings().K == 40
