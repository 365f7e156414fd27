"""Verdicts: what differs is found, what does not is not; their power; exit codes; what is said before drawing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from lightning_toys.mirror_descent import LearnedSampling, LinearGaussian, TiltedSampling
from lightning_toys.mirror_descent.action_density import joint_acceptance
from lightning_toys.mirror_descent.annealed import PCMALA, PCULA, PCJointMALA
from lightning_toys.mirror_descent.chain_runner import REPAID_STEPS, compiles, run_chains
from lightning_toys.mirror_descent.closed_form_checks import (
    ALPHA,
    POWER,
    closed_form_checks,
    detectable_error,
    judge,
    off_target_warning,
    verdicts,
)
from lightning_toys.mirror_descent.diagnostics import (
    ClosedFormCheck,
    Sample,
    check_moments,
    mixing_metrics,
    moments,
    redrawn_states,
)
from lightning_toys.mirror_descent.joint import LinearGaussianJoint, gaussian_kl
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise, init_state, mala, times_standard_normal
from lightning_toys.mirror_descent.problem import Problem, Settings
from lightning_toys.mirror_descent.sampler import gaussian_moments
from lightning_toys.mirror_descent.schedules import Constant, LateRamp, TFGPlusFinalMALA
from lightning_toys.mirror_descent.shipped import SHORT_NAMES
from lightning_toys.mirror_descent.sweeps import refresh_lines
from lightning_toys.mirror_descent.tilt import ActionValue, StateReward
from lightning_toys.training.noise import keyed_generator
from tests.conftest import Runner
from tests.mirror_descent.test_samplers import BY_ACTION, LIKE, PROBLEM, SKEW, with_settings

SINGLE = torch.zeros(())


def drawn(name: str, problem: Problem, blocks: int = 1, like: torch.Tensor = SINGLE) -> list[Sample]:
    return run_chains(SHORT_NAMES[name](problem.centred), [0, 1], blocks * BLOCK_SIZE, like)


# power and verdicts


def exact_sample(n: int, seed: int, factor: float = 1.0) -> Sample:
    z = keyed_generator(seed, 0, "test/verdicts").standard_normal((2, n))
    a = 0.9375 + 0.5 * math.sqrt(factor) * z[0]
    return Sample(a, a + 0.5 * z[1])


@pytest.mark.parametrize("group", [0, 2, 64])
def test_standard_errors(group: int) -> None:
    """Those of the estimates over many samples; with pairs for groups there is no NaN either."""
    exact = gaussian_moments(PROBLEM.tilted_joint, 0.5)
    rows = [check_moments("x", [exact_sample(1000, k)], exact, "exact", exact, 0.5, group) for k in range(100)]
    for i, quantity in enumerate(exact):
        z = np.array([row[i].z for row in rows])
        assert rows[0][i].quantity == quantity
        assert np.isfinite(z).all()
        assert z.std() == pytest.approx(1, abs=0.25 if group == 64 else 0.2)
        assert abs(z.mean()) < 0.3


def test_power_is_what_it_says() -> None:
    """A variance that is wrong by what is detectable is found in 95 of 100 samples, and a right one in hardly any."""
    exact = gaussian_moments(PROBLEM.tilted_joint, 0.5)
    n, found = 30_000, {}
    (_, var, *_) = check_moments("x", [exact_sample(n, 0)], exact, "exact", exact, 0.5)
    family = 80
    error = detectable_error(var, family) / 0.25
    for factor in (1.0, 1 + error):
        hits = 0
        for k in range(200):
            (_, var, *_) = check_moments("x", [exact_sample(n, k, factor)], exact, "exact", exact, 0.5)
            hits += var.p_value(var.z) < ALPHA / family
        found[factor] = hits / 200
    # the wrong distribution's standard error is larger by its factor
    assert POWER - 0.07 < found[1 + error] < 1
    assert found[1.0] == 0


def test_verdicts() -> None:
    def row(sampler: str, z: float, goal_z: float | None, groups: int = 0) -> ClosedFormCheck:
        target = None if goal_z is None else -goal_z
        return ClosedFormCheck(sampler, "mean", -z, "exact", target, 0.0, 1.0, groups)

    rows = judge([row("a", 0.5, 6.0), row("b", -4.5, 0.1), row("c", math.nan, None), row("d", 3.0, 3.0)])
    found = verdicts(rows)
    assert (found["a"]["implementation"], found["a"]["goal"]) == ("agrees", "differs")
    assert (found["b"]["implementation"], found["b"]["goal"]) == ("differs", "agrees")
    assert (found["c"]["implementation"], found["c"]["goal"]) == ("not tested", "not tested")
    # Holm, over the three that were tested: 3 p, 2 p, p
    assert rows[3].p == pytest.approx(2 * 2 * scipy_stats.norm.sf(3.0))
    assert rows[1].p == pytest.approx(3 * 2 * scipy_stats.norm.sf(4.5))
    assert row("e", 2.0, None, 5).p_value(2.0) == pytest.approx(2 * scipy_stats.t.sf(2.0, 4))
    single = ClosedFormCheck("f", "mean", 0.0, "limit", 0.0, 0.1, math.nan, 1)
    assert verdicts(judge([single]))["f"]["implementation"] == "not tested"


WRONG = {  # what is wrong, in whose exact moments
    "pc_mala at twice the step": ("pc_mala", {"mala_step": 1.4}),
    "pc_ula at a step longer by a half": ("pc_ula", {"ula_step": 0.12}),
    "pc_joint_mala without refreshes": ("pc_joint_mala", {"refresh_L": 0, "final_refresh": False}),
    "mala with three steps": ("mala", {"mcmc_steps": 3}),
    "a predictor with half of the levels": ("sde_dps", {"predictor_K": 20}),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_versions_differ(what: str) -> None:
    """Samples of a sampler that does something else differ from the exact moments of the one it is taken for."""
    name, settings = WRONG[what]
    base = with_settings(predictor_K=40, mcmc_steps=60, smc_particles=2**10, smc_K=10)
    blocks = 3
    right = judge(closed_form_checks(SHORT_NAMES[name](base), drawn(name, base, blocks)))
    wrong = judge(closed_form_checks(SHORT_NAMES[name](base), drawn(name, with_settings(base, **settings), blocks)))
    assert verdicts(right)[name]["implementation"] == "agrees"
    assert verdicts(wrong)[name]["implementation"] == "differs"


# the distribution of joint MALA


@pytest.mark.parametrize("eta", [0.7, 0.15])
def test_joint_acceptance(eta: float) -> None:
    """Against the shipped kernel: one step of (a, u) from one a and normal u is accepted as often as the formula says.

    The mean of g over the action's log ratios is the acceptance rate; min(1, exp) alone would be off.
    """
    n = 4 * BLOCK_SIZE
    noise = [Noise([(k, 0)], "test/joint", LIKE) for k in range(4)]
    a = torch.full((BLOCK_SIZE,), 1.3, dtype=torch.float64)
    accepted, log_ratios = [], []
    target = lambda x: (-0.5 * 2.0 * x[0].square(), -2.0 * x)  # noqa: E731
    joint = times_standard_normal(target)
    for one in noise:
        u = one.normal()[0]
        _, info = mala(one, init_state(torch.stack([a, u]), joint), joint, eta)
        accepted.append(info.accepted)
        new = 1.3 - eta * 2.0 * 1.3 + math.sqrt(2 * eta) * one.normal()[0]
        # of N(0, 1/2): log p and the Langevin densities, by their definitions
        forth = -((new - (1 - 2 * eta) * 1.3) ** 2) / (4 * eta)
        back = -((1.3 - (1 - 2 * eta) * new) ** 2) / (4 * eta)
        log_ratios.append(-(new**2) + 1.3**2 + back - forth)
    rate = float(torch.cat(accepted).mean())
    g = joint_acceptance(eta)(torch.cat(log_ratios).numpy())
    error = math.sqrt(rate * (1 - rate) / n + g.var() / n)
    assert abs(rate - g.mean()) < 4.5 * error
    paired = np.minimum(1, np.exp(torch.cat(log_ratios).numpy())) - g
    assert abs(paired.mean()) > 6 * paired.std() / math.sqrt(n)


def test_joint_mala_distribution() -> None:
    """Known numbers of the default problem, and what is not known is not said."""
    found = PCJointMALA(PROBLEM).exact_moments()
    assert (found["mean"], found["var"]) == pytest.approx((0.938058, 0.252105), abs=2e-6)
    assert set(PCJointMALA(with_settings(action_steps_per_level=2)).exact_moments()) == {"slope", "cond_ratio"}
    assert PCJointMALA(with_settings(refresh_L=0, final_refresh=False)).exact_moments() == {}
    assert "before every action step" in PCJointMALA(with_settings(refresh_L=0)).why_unknown()


@pytest.mark.parametrize("name", ["pc_ula", "pc_joint_mala", "pc_mala"])
@pytest.mark.parametrize("knobs", [(0, 2), (1, 3), (3, 3), (2, 3)], ids=str)
def test_refreshes_and_steps_against_exact_moments(name: str, knobs: tuple[int, int]) -> None:
    problem = with_settings(SKEW, K=6, refresh_L=knobs[0], action_steps_per_level=knobs[1], particles=3)
    checks = closed_form_checks(SHORT_NAMES[name](problem), drawn(name, problem))
    for check in checks:
        assert math.isnan(check.z) or check.p_value(check.z) > 7e-6, check
    if name != "pc_joint_mala":
        assert all(check.source == "exact" for check in checks)


# refreshes


def test_refreshes_are_seen_by_ula() -> None:
    """The published main effect, exactly: without a refresh the action's KL is .49, with one a level .011."""
    target = PROBLEM.target

    def kl(**settings: Any) -> float:
        x = PCULA(with_settings(**settings)).exact_distribution()
        assert x is not None
        return gaussian_kl(x.m[0], x.C[0, 0], target.mu, 1 / target.tau)

    assert kl(refresh_L=0) == pytest.approx(0.4855, abs=1e-4)
    assert kl(refresh_L=1) == pytest.approx(0.0113, abs=1e-4)
    lines = refresh_lines(PROBLEM, 4)
    assert lines[2:5] == [
        "| action steps a level | refresh_L 0 | refresh_L 1 | refresh_L 2 | refresh_L 3 | refresh_L 4 |",
        "|---|---:|---:|---:|---:|---:|",
        "| 1 | 0.486 | 0.0113 | - | - | - |",
    ]
    assert lines[5].startswith(f"| 4 | {kl(refresh_L=0, action_steps_per_level=4):.3g} | ")
    assert refresh_lines(dataclasses.replace(PROBLEM, reward=ActionValue()), 4) == refresh_lines(PROBLEM, 0) == []
    # refreshes do not multiply the steps
    assert kl(refresh_L=3) == kl(refresh_L=1)
    assert kl(refresh_L=3, action_steps_per_level=3) != kl(refresh_L=1, action_steps_per_level=3)
    costs = {n: SHORT_NAMES["pc_ula"](with_settings(refresh_L=n, action_steps_per_level=3)).cost() for n in (0, 1, 3)}
    assert {c.score for c in costs.values()} == {120}
    assert [c.refresh for c in costs.values()] == [20 + 1, 40 * 20 + 1, 3 * 40 * 20 + 1]
    by_action = dataclasses.replace(PROBLEM, reward=ActionValue())  # reads no s'
    none, one = (PCULA(with_settings(by_action, refresh_L=n)).exact_distribution() for n in (0, 1))
    assert none is not None
    assert one is not None
    assert np.allclose(none.C, one.C)


# far from 0, and at other scales


def moved(problem: Problem, by: tuple[float, float], scale: float = 1.0) -> Problem:
    """The problem of scale (a, s') + by."""
    j = problem.linear_joint
    mean = j.alpha * j.mu_a + j.shift
    mu_a = scale * j.mu_a + by[0]
    mu_eps = scale * mean + by[1] - j.alpha * mu_a
    joint = LinearGaussianJoint(mu_a, scale * j.sigma_a, j.alpha, scale * j.sigma_sprime, mu_eps=mu_eps)
    r = problem.reward
    reward: StateReward | ActionValue
    if isinstance(r, StateReward):
        w = (r.r_wa / scale**2, r.r_ws / scale**2)
        reward = StateReward(w[0], scale * r.r_a + by[0], w[1], scale * r.r_s + by[1])
    else:
        assert isinstance(r, ActionValue)
        reward = ActionValue(r.q_a / scale**2, scale * r.mu_q + by[0])
    settings = dataclasses.replace(problem.settings, ula_step=problem.settings.ula_step * scale**2)
    return dataclasses.replace(problem, joint=joint, reward=reward, settings=settings)


PLAIN = ("importance", "independence_mh", "ula", "mala", "gibbs")  # without noise levels: all of them move along
EQUIVARIANT = (*PLAIN, "smc_twisted", "sde_dps", "ode_tfg", "sde_h_transform", "ode_none")


@pytest.mark.parametrize("problem", [PROBLEM, BY_ACTION], ids=["state", "action"])
@pytest.mark.parametrize("name", list(SHORT_NAMES))
def test_translation_in_single_precision(name: str, problem: Problem) -> None:
    """At 10 000 every sampler matches its exact moments there; those that move along draw the same, moved."""
    small = with_settings(problem, K=6, predictor_K=20, mcmc_steps=30, smc_particles=2**10, smc_K=6)
    far = moved(small, (1e4, -2e4))
    found = drawn(name, far)
    for check in closed_form_checks(SHORT_NAMES[name](far), found):
        assert math.isnan(check.z) or check.p_value(check.z) > 7e-6, check
    if name in EQUIVARIANT:
        for there, here in zip(found, drawn(name, moved(small, (0.0, 0.0))), strict=True):
            same = np.abs(there.a - 1e4 - here.a) < 1e-3
            assert same.mean() > 0.999
            np.testing.assert_allclose((there.s + 2e4)[same], here.s[same], atol=2e-3)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("name", PLAIN)
def test_scale(name: str, scale: float) -> None:
    for problem in (SKEW, BY_ACTION):
        small = with_settings(problem, mcmc_steps=20)
        for here, there in zip(drawn(name, small), drawn(name, moved(small, (0.0, 0.0), scale)), strict=True):
            assert (np.abs(there.a / scale - here.a) < 1e-3).mean() > 0.999


def test_z_far_from_0() -> None:
    """Everything moved by 1000: Z is the same, and unbiased."""
    far = moved(with_settings(smc_particles=2**10), (1e3, 1e3))
    assert far.target.log_z == pytest.approx(PROBLEM.target.log_z, abs=1e-6)
    for name in ("importance", "smc_twisted"):
        check = closed_form_checks(SHORT_NAMES[name](far), drawn(name, far, 2))[-1]
        assert check.quantity == "Z / exact Z"
        assert abs(check.z) < 4.5


def test_learned_model_in_centred_coordinates() -> None:
    """An exact energy of far data gives the samples of the closed form, in double precision."""
    from lightning_toys.mirror_descent.model import LearnedModel
    from tests.mirror_descent.test_learned import exact_energy

    far = moved(with_settings(K=4, predictor_K=6, mcmc_steps=3, smc_K=4, smc_particles=2**10), (5.0, -3.0))
    learned = dataclasses.replace(far, model=LearnedModel(exact_energy(far)))
    for name in ("mala", "pc_mala", "pc_joint_mala", "sde_dps", "smc_twisted"):
        (a,), (b,) = (run_chains(SHORT_NAMES[name](p.centred), [3], 2000, LIKE) for p in (far, learned))
        assert np.mean(np.abs(a.a - b.a) > 1e-6) < 2e-3, name
        assert np.mean(np.abs(a.s - b.s) > 1e-6) < 2e-3, name


# limits, warnings, controls


def test_density_that_is_too_much_is_known_before() -> None:
    """lambda 10^6: a target a thousand times narrower than where the chain comes from."""
    sharp = PCMALA(dataclasses.replace(PROBLEM, lambda_scale=1e6))
    assert sharp.exact_moments() == {}
    assert "grid of" in sharp.why_unknown()
    assert PCMALA(PROBLEM).why_unknown() == ""
    with pytest.raises(ValueError, match="grid of"):
        sharp.density.solve()


def test_warning_whenever_the_target_is_missed() -> None:
    for problem in (
        dataclasses.replace(PROBLEM, schedule=LateRamp(0.99, 0.995)),
        with_settings(K=1),
        with_settings(K=2),
        with_settings(abar_max=0.8),
    ):
        assert "does not end at the target N(0.938, 0.250)" in off_target_warning(problem)
    assert "with K = 1, 1 action step a level: pc_mala ends" in off_target_warning(with_settings(K=1))
    for problem in (PROBLEM, dataclasses.replace(PROBLEM, schedule=Constant())):
        assert off_target_warning(problem) == ""


def test_natural_controls() -> None:
    """No tilt at all: every sampler draws q."""
    for problem in (
        dataclasses.replace(PROBLEM, reward=ActionValue(q_a=0.0)),
        dataclasses.replace(PROBLEM, reward=StateReward(0.0, 1.0, 0.0, 1.0)),
        dataclasses.replace(PROBLEM, lambda_scale=0.0),
    ):
        assert (problem.target.mu, problem.target.tau) == (0.0, 1.0)
        assert problem.target.importance_ess_fraction == pytest.approx(1)
        for name in ("importance", "pc_mala", "sde_dps", "smc_twisted"):
            small = with_settings(problem, K=5, predictor_K=20, smc_K=6, smc_particles=2**10)
            found = verdicts(judge(closed_form_checks(SHORT_NAMES[name](small), drawn(name, small))))[name]
            assert found["implementation"] == "agrees", (name, found)


def test_final_mala_step() -> None:
    problem = dataclasses.replace(PROBLEM, schedule=TFGPlusFinalMALA(final_steps=2))
    plain, same, short = (
        PCMALA(with_settings(problem, final_mala_step=step)).exact_moments()["mean"] for step in (None, 0.7, 0.1)
    )
    assert plain == same
    assert abs(plain - short) > 0.05
    for step in (0.1, 0.7):
        small = with_settings(problem, final_mala_step=step, K=6)
        for check in closed_form_checks(SHORT_NAMES["pc_mala"](small), drawn("pc_mala", small)):
            assert check.p_value(check.z) > 7e-6, check


def test_metrics_of_the_seed_document() -> None:
    problem = with_settings(K=8, action_steps_per_level=2)
    (sample, _) = drawn("pc_mala", problem)
    cost = SHORT_NAMES["pc_mala"](problem).cost().total
    found = mixing_metrics(sample, False, cost)
    assert sample.steps == 16
    assert found["esjd_per_cost"] == pytest.approx(found["esjd"] * 16 / cost)
    assert found["ess_per_sample"] == pytest.approx(1, abs=0.1)  # chains are independent
    # next states redrawn from the sampler's own actions: s' | a is then right, whatever a is
    (leaky, _) = drawn("ode_poe", PROBLEM)
    again = moments(leaky.a, redrawn_states(PROBLEM, leaky), 0.5)
    assert again["slope"] == pytest.approx(1, abs=0.03)
    assert moments(leaky.a, leaky.s, 0.5)["slope"] > 1.5


def test_short_traces_say_nothing() -> None:
    z = keyed_generator(0, 0, "test/short").standard_normal((12, 16))
    assert "ess_per_step" not in mixing_metrics(Sample(z[0], z[0], trace=z), True)


# compiled or not


def test_compile_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    where = "lightning_toys.mirror_descent.chain_runner.has_compiler"
    monkeypatch.setattr(where, lambda: True)
    settings = Settings()
    assert settings.compile == "auto"
    many = -(-REPAID_STEPS // (40 * BLOCK_SIZE))
    pc_mala, gibbs = (SHORT_NAMES[n](PROBLEM) for n in ("pc_mala", "gibbs"))
    assert compiles(settings, SINGLE, [pc_mala], many)
    assert not compiles(settings, SINGLE, [pc_mala], many - 1)
    assert not compiles(settings, SINGLE, [gibbs], 10**6)
    assert not compiles(settings, LIKE, [pc_mala], many)  # double precision has no compiled noise
    assert compiles(Settings(compile=False), SINGLE, [pc_mala], many) is False
    monkeypatch.setattr(where, lambda: False)
    assert not compiles(settings, SINGLE, [pc_mala], many)


# through the command line


@pytest.fixture
def mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    small = ("--model.seeds", "[0,1]", "--model.chains", "3000", "--model.sweep_max_refresh", "0")
    return Runner(tmp_path / "logs", capsys, "mirror_descent", (*small, "--figures.enabled", "false"))


def test_assert_implementation(mirror: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--model.samplers", "[pc_ula,mala]", "--model.assert_implementation", "true")
    assert "| pc_ula | agrees | differs (var) |" in mirror.ok("test", "analytic", *flags, "--run.name", "right")

    broken = PCULA.draw

    def draw(self: PCULA, noise: Noise) -> Any:
        out = broken(self, noise)
        return dataclasses.replace(out, a=out.a * 1.2)

    monkeypatch.setattr(PCULA, "draw", draw)
    code, err = mirror.code("test", "analytic", *flags, "--run.name", "wrong")
    assert code == 1
    assert "error: --model.assert_implementation: samples differ from their sampler's exact moments: pc_ula mean" in err
    assert "Traceback" not in err
    found = json.loads((mirror.folder("analytic", "wrong") / "results.json").read_text())
    assert found["arrays"]["verdicts"]["pc_ula"]["implementation"] == "differs"
    assert found["arrays"]["verdicts"]["mala"]["implementation"] == "agrees"
    assert {"p_holm", "goal_p_holm", "detectable", "implementation", "goal"} <= set(found["arrays"]["checks"][0])
    mirror.ok("test", "analytic", *flags[:2], "--run.name", "told")  # without the flag it is told, and no error


def test_what_cannot_be_tested_is_said(mirror: Runner) -> None:
    flags = ("--model.samplers", "[pc_mala,smc_twisted]", "--model.seeds", "[0]", "--model.chains", "2048")
    err = mirror.ok("test", "analytic", *flags, "--model.settings.smc_particles", "2048")
    assert "smc_twisted: one group of 2048 draws: its moments have no standard error" in err
    (row,) = (line for line in err.splitlines() if line.startswith("| smc_twisted | slope |"))
    assert [cell.strip() for cell in row.split("|")][8] == "not tested"
    assert "metrics without @ are those of pc_mala" in err
    err = mirror.ok("test", "analytic", *flags, "--model.settings.smc_particles", "2", "--run.name", "pairs")
    assert "nan" not in err
    err = mirror.ok("test", "analytic", *flags[:4], "--model.lambda_scale", "1000000", "--run.name", "sharp",
                    "--model.chains", "4096")  # fmt: skip
    assert "pc_mala: its exact density would take a grid of" in err
    assert err.index("exact density") < err.index("| pc_mala | mean | - | unknown |")


def test_score_of_other_data_says_so() -> None:
    data = LinearGaussian(mu_a=0.3)
    module = LearnedSampling(samplers=["mala"])
    sizes = module.measure(data)
    assert sizes["joint"]["mu_a"] == 0.3
    assert json.loads(json.dumps(sizes)) == sizes


def test_warning_of_other_data(capsys: pytest.CaptureFixture[str]) -> None:
    module = LearnedSampling(samplers=["mala"])
    module.trained_on = module.measure(LinearGaussian(mu_a=0.3))["joint"]
    module.tell_before_drawing(module.problem_on(LinearGaussian(mu_a=0.3)), [])
    assert capsys.readouterr().err == ""
    module.tell_before_drawing(module.problem_on(LinearGaussian(alpha=2.0)), [])
    said = capsys.readouterr().err
    assert "warning: the score was learned from other data than these" in said
    assert said.endswith("--data has mu_a = 0, not 0.3, alpha = 2, not 1\n")
    assert TiltedSampling().sampler_names == list(SHORT_NAMES)
