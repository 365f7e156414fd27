"""MixtureSampling: shipped samplers on mixtures and under rewards of any form, verdicts and commands."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent import (
    Linear,
    LinearGaussian,
    MixtureSampling,
    QuadraticReward,
    Quartic,
    Reward,
    StateReward,
    Step,
)
from lightning_toys.mirror_descent.chain_runner import run_chains
from lightning_toys.mirror_descent.closed_form_checks import judge, verdicts
from lightning_toys.mirror_descent.diagnostics import ClosedFormCheck, Sample
from lightning_toys.mirror_descent.grid_distribution import probability_beyond
from lightning_toys.mirror_descent.joint import LinearGaussianJoint
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE
from lightning_toys.mirror_descent.mixture import GaussianMixtureJoint, Mixture
from lightning_toys.mirror_descent.mixture_checks import distances, mixture_checks, points_of, pooling_weights
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.shipped import KNOWN
from lightning_toys.mirror_descent.tilt import ActionValue
from lightning_toys.mirror_descent.twisted_smc import TwistedSMC
from tests.conftest import REPO, Runner
from tests.mirror_descent.test_mixture import FOUR, PLANE, problem_of

SINGLE = torch.zeros(())
SMALL: dict[str, Any] = {"smc_particles": 2**9, "smc_K": 16, "mcmc_steps": 8, "K": 6, "predictor_K": 20}
QUADRATIC = QuadraticReward([0.7, 1.1], [0.8, -0.5])


def checked(name: str, problem: Problem, blocks: int = 1) -> list[ClosedFormCheck]:
    """A sampler's checks, of two seeds."""
    sampler, truth = KNOWN[name](problem), problem.tilted.truth  # type: ignore[attr-defined]
    samples = run_chains(sampler, [0, 1], blocks * BLOCK_SIZE, SINGLE)
    return mixture_checks(sampler, samples, problem.joint, truth)  # type: ignore[arg-type]


def worst(checks: list[ClosedFormCheck]) -> float:
    """The smallest p-value of an implementation, times their number."""
    p = [c.p_value(c.z) for c in checks if not math.isnan(c.z)]
    assert p
    return min(p) * len(p)


@pytest.mark.parametrize("name", ["importance", pytest.param("smc_twisted_multinomial", marks=pytest.mark.slow)])
def test_exact_in_the_limit(name: str) -> None:
    """On two actions and two next states: weights, means, covariances, E Q, s' | a and Z."""
    checks = checked(name, problem_of(FOUR, QUADRATIC, 1.2, **SMALL))
    assert worst(checks) > 1e-3, min(checks, key=lambda c: c.p_value(c.z))
    assert {c.source for c in checks} == {"limit", "exact"}
    assert len(checks) >= 3 + 4 + 10 + 1 + 4 + 1


@pytest.mark.slow
def test_the_gaussian_kernel_alone_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights with the proposal's Gaussian in the place of the mixture's exact kernel differ."""
    problem = problem_of(FOUR, QUADRATIC, 1.2, **{**SMALL, "smc_K": 8})
    assert worst(checked("smc_twisted", problem)) > 1e-3

    def gaussian(self: TwistedSMC, k: int, before: Any, old: Any, after: Any, new: Any) -> Any:
        # the kernel's own density at x': log p - log proposal is then that of the linear-Gaussian problem
        shift = torch.linalg.solve_triangular(
            old.root.movedim((0, 1), (-2, -1)), (after - old.mean).movedim(0, -1).unsqueeze(-1), upper=False
        )
        return -0.5 * shift.squeeze(-1).square().sum(-1).double()

    monkeypatch.setattr(TwistedSMC, "exact_kernel_ratio", gaussian)
    assert worst(checked("smc_twisted", problem)) < 1e-6


@pytest.mark.parametrize("reward", [Quartic(0.8, 1.2, 0.2), Step(1.5, 0.3)], ids=["quartic", "step"])
@pytest.mark.parametrize("name", ["ula", "mala", "independence_mh", "pc_mala", "pc_ula"])
def test_distributions_of_chains_of_one_action(name: str, reward: Reward) -> None:
    """What eight steps, or six levels, leave of the start is in the distribution; the target itself is far away."""
    problem = problem_of(PLANE, reward, 1.0, **SMALL, ula_step=0.03)
    checks = checked(name, problem)
    assert {c.source for c in checks} == {"exact"}
    assert worst(checks) > 1e-3, min(checks, key=lambda c: c.p_value(c.z))
    if name != "independence_mh":
        assert max(abs(c.goal_z) for c in checks) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("q", "reward", "levels"),
    [(FOUR, QUADRATIC, 60), (PLANE, Quartic(0.8, 1.2, 0.2), 200)],
    ids=["quadratic", "quartic"],
)
def test_reverse_process_with_the_h_transform_ends_at_the_target(q: Mixture, reward: Reward, levels: int) -> None:
    """Its error falls with the levels, to less than half of what Q's gradient leaves; unguided it stays at q's."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    few = levels // 5
    for rule, K in (("h_transform", few), ("h_transform", levels), ("none", levels), ("poe", levels)):
        problem = problem_of(q, reward, 1.2, predictor_K=K)
        truth: Any = problem.tilted.truth  # type: ignore[attr-defined]
        (sample,) = run_chains(KNOWN[f"sde_{rule}"](problem), [0], BLOCK_SIZE, SINGLE)
        found[rule, K] = distances(problem.joint, reward, truth, points_of(sample))  # type: ignore[arg-type]
    right = found["h_transform", levels]
    assert right["w1"] < 2.5 / levels + 0.015 < 0.15 < found["none", levels]["w1"]
    assert right["mode_tv"] < 0.02
    assert right["w1"] < 0.5 * found["h_transform", few]["w1"]
    assert right["w1"] < 0.5 * found["poe", levels]["w1"]
    assert right["conditional_ks"] < 0.03


@pytest.mark.parametrize("name", ["sde_dps", "sde_tfg", "sde_h_transform", "ode_poe", "ddim1_dps"])
def test_one_component_is_the_linear_gaussian_problem(name: str) -> None:
    """The same rules by scores and Jacobians, against the exact Gaussian that their coefficients give."""
    joint, reward = LinearGaussianJoint(0.0, 0.8, -0.7, 0.6), ActionValue(0.9, 0.7)
    linear = Problem(joint, reward, Linear(), 1.2, problem_of(PLANE, reward, **SMALL).settings)
    one = problem_of(Mixture(np.ones(1), joint.clean.m[None], joint.clean.C[None], 1), reward, 1.2, **SMALL)
    want = KNOWN[name](linear).exact_distribution()
    assert want is not None
    (sample,) = run_chains(KNOWN[name](one), [0], 2 * BLOCK_SIZE, SINGLE)
    x = points_of(sample)
    errors = (x.mean(0) - want.m) / np.sqrt(np.diag(want.C) / len(x))
    assert np.abs(errors).max() < 4.5
    products = (x - want.m)[:, :, None] * (x - want.m)[:, None]
    z = (products.mean(0) - want.C) / (products.std(0) / math.sqrt(len(x)))
    assert np.abs(z).max() < 4.5


def test_distances_of_exact_draws_are_small() -> None:
    problem = problem_of(FOUR, QUADRATIC, 1.2)
    truth: Any = problem.tilted.truth  # type: ignore[attr-defined]
    exact = distances(problem.joint, QUADRATIC, truth, truth.draw(0, 50_000))  # type: ignore[arg-type]
    assert exact["w1"] < 0.02
    assert exact["mode_tv"] < 0.01
    assert exact["conditional_ks"] < 1.8 / math.sqrt(50_000)
    assert exact["reward"] == pytest.approx(truth.mean_reward, abs=0.02)
    # a shift of all by half a deviation of each coordinate is a distance of half
    moved = distances(  # type: ignore[call-arg]
        problem.joint,
        QUADRATIC,
        truth,
        truth.draw(0, 50_000) + 0.5 * np.sqrt(np.diag(truth.covariance)),  # type: ignore[arg-type]
    )
    assert moved["w1"] == pytest.approx(0.5, abs=0.02)


# through the command line


@pytest.fixture
def mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    small = ("--model.seeds", "[0,1]", "--model.chains", "2000", "--model.settings.smc_particles", "256")
    steps = ("--model.settings.mcmc_steps", "10", "--model.settings.predictor_K", "12", "--model.settings.smc_K", "8")
    return Runner(tmp_path / "logs", capsys, "mirror_descent", (*small, *steps, "--figures.dpi", "30"))


@pytest.mark.slow
def test_outputs(mirror: Runner) -> None:
    flags = ("--model.samplers", "[fk_difference,sde_none,mala]", "--model.budgets", "[0.5,1]", "--model.bins", "12")
    err = mirror.ok("test", "quartic", *flags, "--model.budget_chains", "1000")
    folder = mirror.folder("quartic")
    assert "Exact distribution (adaptive quadrature, error below" in err
    assert "| sampler | w1 | mode_tv | moment_kl | conditional_ks | reward | evaluations |" in err
    assert "Implementation is not tested, the sampler's own distribution is not known: sde_none." in err
    found = json.loads((folder / "results.json").read_text())
    assert {"w1", "w1@mala", "mode_tv@sde_none", "log_z@fk_difference", "acceptance@mala", "reward@mala"} <= set(
        found["metrics"]
    )
    words = {n: v["implementation"] for n, v in found["arrays"]["verdicts"].items()}
    assert words == {"fk_difference": "agrees", "sde_none": "not tested", "mala": "agrees"}
    assert found["arrays"]["verdicts"]["mala"]["goal"] == "differs"
    assert 0 < found["arrays"]["exact"]["error"] < 1e-8
    assert len(found["arrays"]["frontier"]["mala"]["evaluations"]) == 2
    table = (folder / "facts.md").read_text()
    assert "| mala | cov a,s' |" in table
    assert "| fk_difference | Z / exact Z |" in table
    figures = {p.name for p in (folder / "figures").iterdir()}
    assert {"frontier.png", "modes.png", "match_mala.png", "match_fk_difference.png"} <= figures


@pytest.mark.slow
def test_predictions(mirror: Runner) -> None:
    mirror.ok("predict", "mixture", "--model.samplers", "[importance]", "--run.name", "predicted")
    with np.load(mirror.folder("mixture", "predicted") / "predictions.npz") as file:
        assert file["importance"].shape == (2, 2000, 4)


def test_assert_implementation(mirror: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--model.samplers", "[mala]", "--model.assert_implementation", "true", "--figures.enabled", "false")
    mirror.ok("test", "quartic", *flags, "--run.name", "right")
    broken = run_chains

    def moved(*args: Any, **kwargs: Any) -> Any:
        return [dataclasses.replace(x, s=x.s + 0.15) for x in broken(*args, **kwargs)]

    monkeypatch.setattr("lightning_toys.mirror_descent.evaluation.run_chains", moved)
    code, err = mirror.code("test", "quartic", *flags, "--run.name", "wrong")
    assert code == 1
    assert "samples differ from their sampler's exact moments: mala mean s'" in err


BAD = [
    (("--model.samplers", "[gibbs]"), "'gibbs' is not allowed here, it needs the linear-Gaussian problem"),
    (("--model.samplers", "[mala,smc_twiisted]"), "did you mean 'smc_twisted'?"),
    (("--model.samplers", "[{class_path: Predictor, init_args: {rule: own_rule.Delayed}}]"), "has affine_term alone"),
    (("--model.samplers", "[{class_path: SVDD, init_args: {m: 0}}]"), "SVDD's m: 0 is not allowed"),
    (("--model.samplers", "[smc_twisted]", "--model.settings.smc_particles", "4096"), "give at least 4096"),
    (("--model.reward", "StateReward"), "StateReward is not allowed here, it has no value(a)"),
    (("--model.reward", "QuadraticReward", "--model.reward.weights", "[1,1]"), "1 numbers are not allowed with 2"),
    (("--model.samplers", "[ula]", "--model.settings.ula_step", "3"), "--model.settings.ula_step: 3.0 is not allowed"),
    (("--data.action_dim", "2"), "--data.action_dim: 2 is not allowed"),
    (("--model.budgets", "[0]"), "--model.budgets: 0.0 is not allowed"),
]


@pytest.mark.parametrize(("flags", "says"), BAD, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_bad_input_is_one_line(
    mirror: Runner, flags: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(REPO / "docs" / "examples" / "own_classes" / "own_rule.py", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, err = mirror.code("test", "quartic", *flags)
    assert code == 2, err
    assert says in err
    assert err.count("\n") == 1, err
    assert not mirror.root.exists()


def test_a_budget_at_which_draws_run_away_costs_no_other_result(mirror: Runner) -> None:
    """Ten levels of a guided reverse process under a quartic run away: nothing is known there, all else is written."""
    flags = ("--model.samplers", "[sde_poe,mala]", "--model.settings.predictor_K", "100", "--model.budgets", "[0.1,1]")
    err = mirror.ok("test", "quartic", *flags, "--figures.enabled", "true")
    assert re.search(r"warning: sde_poe ran away in 0\.\d+ of its draws at 0\.1 times its budget", err)
    found = json.loads((mirror.folder("quartic") / "results.json").read_text())
    poe, mala = (found["arrays"]["frontier"][name]["w1"] for name in ("sde_poe", "mala"))
    assert len(poe) == len(found["seeds"]) > 0
    assert all(small is None and np.isfinite(whole) for small, whole in poe)
    assert np.isfinite(np.array(mala, dtype=float)).all()
    assert (mirror.folder("quartic") / "figures" / "frontier.png").is_file()


def test_draws_that_ran_away_are_told(mirror: Runner) -> None:
    """An unadjusted step that is too long for a quartic's tails: the draws are left out, and the goal is missed."""
    flags = ("--model.samplers", "[ula]", "--model.reward.height", "3", "--model.assert_implementation", "true")
    flags += ("--model.settings.ula_step",)
    err = mirror.ok("test", "quartic", *flags, "0.06", "--figures.enabled", "false")
    assert "warning: ula ran away in 0." in err
    found = json.loads((mirror.folder("quartic") / "results.json").read_text())
    assert 0 < found["metrics"]["lost@ula"]["mean"] < 0.5
    (row,) = (r for r in found["arrays"]["checks"] if r["quantity"] == "lost")
    assert row["goal"] == "differs"
    # the kept draws' distribution is not known: they are the ones that stayed
    assert {r["implementation"] for r in found["arrays"]["checks"] if r["sampler"] == "ula"} == {"not tested"}
    assert np.isfinite(found["metrics"]["w1@ula"]["values"]).all()
    err = mirror.ok("predict", "quartic", *flags, "0.06")
    assert "warning: ula ran away in 0." in err
    (path,) = mirror.root.rglob("predictions.npz")
    with np.load(path) as drawn:
        seeds, kept, dim = drawn["ula"].shape  # as many as every seed has left
        assert (seeds, dim) == (len(found["seeds"]), 2)
        assert kept < found["settings"]["model.chains"]
        assert np.isfinite(drawn["ula"]).all()
    code, err = mirror.code("test", "quartic", *flags, "0.1", "--data.std", "6")
    assert code == 2, err
    assert "--model.samplers: ula ran away" in err
    assert "Traceback" not in err


def test_a_distribution_is_not_known_where_unadjusted_steps_run_away() -> None:
    """On the grid what leaves it would stay: short steps have a distribution, long ones none; MALA rejects."""
    short = problem_of(PLANE, Quartic(0.8, 1.2, 0.2), 1.0, **SMALL, ula_step=0.03)
    long = problem_of(PLANE, Quartic(3.0, 1.0), 1.0, **SMALL, ula_step=0.06)
    assert KNOWN["ula"](short).exact_distribution_on_mixtures() is not None
    assert KNOWN["ula"](long).exact_distribution_on_mixtures() is None
    assert KNOWN["mala"](long).exact_distribution_on_mixtures() is not None
    grid = np.linspace(-1.0, 1.0, 5)
    beyond = probability_beyond(grid, -grid, 0.1)
    np.testing.assert_allclose(beyond, [ndtr((-1 - 0.9 * x) / 0.2**0.5) + ndtr((0.9 * x - 1) / 0.2**0.5) for x in grid])


@pytest.mark.parametrize("name", ["fk_difference", pytest.param("smc_tempered", marks=pytest.mark.slow)])
def test_few_particles_are_not_tested_against_their_limit(name: str) -> None:
    """Their bias is of one over the number: with 4 it shows, in code that is right. Z is unbiased with any number, and
    so are moments that are pooled by it, whose weights take the bias away."""
    found = {}
    for n in (4, 256):
        problem = problem_of(PLANE, Quartic(0.8, 1.2, 0.2), 1.0, smc_particles=n, smc_K=4)
        found[n] = {c.quantity: c for c in checked(name, problem)}
    few, many = found[4], found[256]
    tested = {k: c.z for k, c in few.items() if not math.isnan(c.z)}
    assert set(tested) == {"Z / exact Z"} | {f"pooled {k}" for k, c in few.items() if c.target is not None}
    assert max(map(abs, tested.values())) < 4.5
    assert max(abs(c.goal_z) for c in few.values() if c.target is not None) > 4.5
    assert {c.source for c in many.values()} == {"limit", "exact"}
    assert worst(list(many.values())) > 1e-3


def test_pooling_weights() -> None:
    """Each draw weighs as its group's estimate of Z; no weights where these are none, or where one group has it all."""
    sample = Sample(np.zeros(40), np.zeros(40), extra={"log_z": [0.0] * 5 + [math.log(2.0)] * 5 + [50.0]})
    weight = pooling_weights([sample], 4)  # the eleventh group's draws were not asked for
    assert weight is not None
    np.testing.assert_allclose(weight, [2 / 3] * 20 + [4 / 3] * 20)
    uneven = dataclasses.replace(sample, extra={"log_z": [0.0] * 9 + [9.0]})
    assert pooling_weights([uneven], 4) is None
    assert pooling_weights([sample], 3) is None
    assert pooling_weights([dataclasses.replace(sample, extra=None)], 4) is None
    assert pooling_weights([sample], 0) is None


def test_linear_and_mixture_problems_do_not_fit_each_other() -> None:
    with pytest.raises(ToyError, match="--data: LinearGaussian is not allowed; give GaussianMixture"):
        MixtureSampling().measure(LinearGaussian())
    with pytest.raises(ToyError, match="closed forms of the linear-Gaussian problem are wanted"):
        _ = problem_of(PLANE, StateReward()).linear_joint


@pytest.mark.slow
def test_own_classes_run_on_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler, a reward and a rule from outside the package: judged against quadrature."""
    for name in ("own_sampler", "own_reward"):
        shutil.copy(REPO / "docs" / "examples" / "own_classes" / f"{name}.py", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    from own_reward import Clipped, Distance  # type: ignore[import-not-found]
    from own_sampler import RandomWalk

    from lightning_toys.mirror_descent import Predictor

    problem = problem_of(PLANE, Distance(), 1.0, predictor_K=60)
    truth: Any = problem.tilted.truth  # type: ignore[attr-defined]
    assert truth.error < 1e-8
    far = {}
    for name, sampler in (("walk", RandomWalk(problem, 1.5, 80)), ("rule", Predictor(problem, "sde", Clipped))):
        samples = run_chains(sampler, [0, 1], BLOCK_SIZE, SINGLE)
        joint: GaussianMixtureJoint = problem.joint  # type: ignore[assignment]
        found = judge(mixture_checks(sampler, samples, joint, truth))
        (words,) = verdicts(found).values()
        assert words["implementation"] == "not tested"
        far[name] = words["goal"], distances(joint, problem.reward, truth, points_of(samples[0]))["w1"]
    assert far["walk"][0] == "agrees"
    assert far["rule"][0] == "differs"
    assert far["walk"][1] < 0.02 < far["rule"][1]


def test_the_floor_of_budgets_is_of_as_many_draws_as_budgets_have() -> None:
    """More draws than the main tables', or fewer: the error of exact draws falls as the root of their number."""
    problem = problem_of(PLANE, Quartic(0.8, 1.2, 0.2), 1.0)
    truth: Any = problem.tilted.truth  # type: ignore[attr-defined]
    fake = SimpleNamespace(problem=problem, reward=problem.reward, seeds=range(8), chains=256, budget_chains=16384)
    found = MixtureSampling.references(fake, problem.joint, truth)  # type: ignore[arg-type]
    ratio = found["exact_draws"]["w1"] / found["exact_draws_of_budgets"]["w1"]
    assert 5 < ratio < 13  # the root of 64 is 8
