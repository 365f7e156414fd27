"""Feynman-Kac correctors against their exact distribution, and soft values learned by regression against exact ones."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent.chain_runner import run_chains
from lightning_toys.mirror_descent.closed_form_checks import closed_form_checks
from lightning_toys.mirror_descent.feynman_kac_correctors import FeynmanKacCorrectors, weighed
from lightning_toys.mirror_descent.guidance import DiffusionPosteriorSampling, HTransform
from lightning_toys.mirror_descent.guidance_grid import SCALES, SCHEDULES, main, settings_of, table
from lightning_toys.mirror_descent.guidance_grid import problem_of as problem_of_levels
from lightning_toys.mirror_descent.joint import Gaussian, gaussian_kl
from lightning_toys.mirror_descent.kernels import BLOCK_SIZE, Noise
from lightning_toys.mirror_descent.mixture_checks import distances, points_of
from lightning_toys.mirror_descent.predictors import Predictor
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.rewards import QuadraticReward, Quartic
from lightning_toys.mirror_descent.schedules import Constant, SigmaPower
from lightning_toys.mirror_descent.shipped import KNOWN
from lightning_toys.mirror_descent.soft_value import KEPT, SoftValue
from tests.mirror_descent.test_mixture import FOUR, PLANE, problem_of
from tests.mirror_descent.test_mixture_sampling import checked
from tests.mirror_descent.test_samplers import PROBLEM, SKEW, with_settings

SINGLE = torch.zeros(())


# Feynman-Kac correctors


def test_weighed_gaussians() -> None:
    """One coordinate, by the trapezoidal rule."""
    x = np.linspace(-12, 12, 20_001)
    w = np.exp(-0.5 * (x - 0.3) ** 2 / 0.7 + 0.4 * x - 0.5 * 1.3 * x * x)
    found = weighed(Gaussian(np.array([0.3]), np.array([[0.7]])), np.array([[1.3]]), np.array([0.4]))
    assert found is not None
    distribution, log_z = found
    mean = (x * w).sum() / w.sum()
    assert float(distribution.m[0]) == pytest.approx(mean, abs=1e-9)
    assert float(distribution.C[0, 0]) == pytest.approx(((x - mean) ** 2 * w).sum() / w.sum(), abs=1e-9)
    assert log_z == pytest.approx(math.log(w.sum() * (x[1] - x[0]) / math.sqrt(2 * math.pi * 0.7)), abs=1e-9)
    assert weighed(distribution, np.array([[-9.0]]), np.array([0.0])) is None


@pytest.mark.parametrize("schedule", [SKEW.schedule, Constant(), SigmaPower()], ids=lambda s: type(s).__name__)
def test_correctors_tend_to_the_target(schedule: Constant) -> None:
    """With infinitely many particles: the KL falls as 1 / K^2, the error of Z as 1 / K, whatever the schedule; the
    distribution does not depend on the origin."""
    kls, errors = [], []
    for K in (160, 320, 640):
        problem = dataclasses.replace(with_settings(SKEW, smc_K=K), schedule=schedule)
        found, centred = FeynmanKacCorrectors(problem).limit, FeynmanKacCorrectors(problem.centred).limit
        assert found is not None
        assert centred is not None
        np.testing.assert_allclose(centred[0].m + problem.centred.origin, found[0].m, atol=1e-12)
        assert centred[1] == pytest.approx(found[1], abs=1e-12)
        kls.append(gaussian_kl(found[0].m, found[0].C, problem.tilted_joint.m, problem.tilted_joint.C))
        errors.append(abs(found[1] - problem.tilted.log_z))
    assert kls[0] < 1e-3
    assert [a / b for a, b in itertools.pairwise(kls)] == pytest.approx([4, 4], rel=0.15)
    assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([2, 2], rel=0.15)


def test_correctors_draw_from_their_distribution() -> None:
    problem = with_settings(SKEW, smc_particles=2**11, smc_K=12)
    samples = run_chains(FeynmanKacCorrectors(problem.centred), [0, 1], BLOCK_SIZE, SINGLE)
    checks = closed_form_checks(FeynmanKacCorrectors(problem), samples)
    assert [c.quantity for c in checks] == ["mean", "var", "slope", "cond_ratio", "Z / exact Z"]
    assert {c.source for c in checks} == {"exact"}
    assert min(c.p_value(c.z) for c in checks) > 1e-3, checks
    assert max(abs(c.goal_z) for c in checks if c.target is not None) > 20  # few levels miss the target
    cost = FeynmanKacCorrectors(problem).cost()
    assert cost._asdict() == {"prior": 1, "score": 12, "value": 13, "refresh": 0}


def test_correctors_mend_the_product_of_experts_on_a_mixture() -> None:
    problem = problem_of(
        FOUR, QuadraticReward([0.5, 1.0], [1.5, -0.5]), 1.0, predictor_K=40, smc_K=40, smc_particles=512
    )
    truth = problem.tilted.truth  # type: ignore[attr-defined]
    w1 = {}
    for name in ("sde_poe", "fkc"):
        (sample,) = run_chains(KNOWN[name](problem), [0], BLOCK_SIZE, SINGLE)
        w1[name] = distances(problem.joint, problem.reward, truth, points_of(sample))["w1"]  # type: ignore[arg-type]
    assert w1["fkc"] < 0.5 * w1["sde_poe"], w1
    assert all(math.isnan(c.z) for c in checked("fkc", problem))  # its distribution at so many levels is not known here


# learned soft values


class MeanValue(SoftValue):
    """The wrong one: E[lambda Q | x] in the place of log E[exp(lambda Q) | x]."""

    def loss(self, v: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """See :meth:`SoftValue.loss`."""
        return (v - r).square().mean()


def relative_error(kind: type[SoftValue], problem: Problem, abar: float) -> float:
    """The root mean square error of a learned gradient over that of the exact one's, on draws of a level."""
    rule = kind(problem.joint, problem.reward, problem.lambda_scale, fit_steps=600, hidden=32)
    exact, level = HTransform(problem.joint, problem.reward, problem.lambda_scale), problem.joint.level(abar)
    x = problem.model.draw(Noise([(1, 0)], "test", SINGLE), level)[:, :4000]
    want = exact.guided_score(problem.model, level, 1.0, x) - problem.model.score(level, x)
    return float((rule.value_gradient(problem.model, level, x) - want).square().sum().div(want.square().sum()).sqrt())


def test_soft_values_are_learned() -> None:
    for abar, bound in ((0.3, 0.85), (0.7, 0.4)):
        assert relative_error(SoftValue, SKEW, abar) < bound
        assert relative_error(MeanValue, SKEW, abar) > 1.2 * bound


def test_the_loss_has_the_soft_value_for_its_minimiser() -> None:
    r = torch.tensor([0.0, -1.0, -3.0], dtype=torch.float64)
    v = torch.logsumexp(r, 0).sub(math.log(3)).clone().requires_grad_(True)
    loss = SoftValue(PROBLEM.joint, PROBLEM.reward, 1.0).loss(v, r)
    (slope,) = torch.autograd.grad(loss, v)
    assert float(slope) == pytest.approx(0, abs=1e-14)


def test_a_fit_is_kept_and_keyed() -> None:
    """A function of pairs, settings and seed; bad settings are refused in one line."""

    def net(seed: int, steps: int = 3) -> object:
        rule = SoftValue(SKEW.joint, SKEW.reward, 1.0, fit_steps=steps, hidden=8, fit_seed=seed)
        return rule.fitted(SKEW.model, SINGLE)

    assert net(0) is net(0)
    assert net(0) is not net(1)
    assert net(0) is not net(0, 4)
    assert len(KEPT) <= 8
    first = torch.stack([p.sum() for p in net(0).parameters()])  # type: ignore[attr-defined]
    KEPT.clear()
    assert torch.equal(first, torch.stack([p.sum() for p in net(0).parameters()]))  # type: ignore[attr-defined]
    with pytest.raises(ToyError, match=r"SoftValue's fit_steps: 0 is not allowed"):
        SoftValue(SKEW.joint, SKEW.reward, 1.0, fit_steps=0)


def test_a_fit_does_not_depend_on_the_dtype_that_modules_are_made_in() -> None:
    """`--trainer.precision 64-true` makes modules in double: the fit is that of single precision, to a rounding."""
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            rule = SoftValue(SKEW.joint, SKEW.reward, 1.0, fit_steps=5, hidden=8)
            x = torch.linspace(-1, 1, 8, dtype=dtype).reshape(2, 4)
            found.append(rule.value_gradient(SKEW.model, SKEW.joint.level(0.7), x))
        finally:
            torch.set_default_dtype(torch.float32)
    assert [x.dtype for x in found] == [torch.float32, torch.float64]
    assert torch.allclose(found[0].double(), found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_guidance_by_a_learned_soft_value() -> None:
    """Nearer than DPS, on a mixture and in the linear-Gaussian problem; its goal alone is judged."""
    for problem in (problem_of(FOUR, QuadraticReward([0.5, 1.0], [1.5, -0.5]), 1.0, predictor_K=60),
                    problem_of(PLANE, Quartic(0.8, 1.2, 0.2), 1.0, predictor_K=60)):  # fmt: skip
        truth, w1 = problem.tilted.truth, {}  # type: ignore[attr-defined]
        for name in ("sde_dps", "sde_soft_value"):
            (sample,) = run_chains(KNOWN[name](problem), [0], BLOCK_SIZE, SINGLE)
            w1[name] = distances(problem.joint, problem.reward, truth, points_of(sample))["w1"]  # type: ignore[arg-type]
        assert w1["sde_soft_value"] < 0.5 * w1["sde_dps"], w1
    sampler = KNOWN["sde_soft_value"](SKEW)
    assert isinstance(sampler, Predictor)
    assert sampler.exact_distribution() is None
    checks = closed_form_checks(sampler, run_chains(KNOWN["sde_soft_value"](SKEW.centred), [0], BLOCK_SIZE, SINGLE))
    assert {c.source for c in checks} == {"unknown"}


# guidance at every schedule and scale


def test_the_grid_of_guidance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its default is the predictor's own distribution; a best cell is no worse; a file is never written over."""
    problem = problem_of_levels(30)
    cells = list(settings_of(problem, DiffusionPosteriorSampling, "sde"))
    assert len(cells) == len(SCHEDULES) * len(SCALES)
    default = next(c for c in cells if (c.schedule, c.scale) == ("Linear", 1.0))
    x = KNOWN["sde_dps"](problem).exact_distribution()
    assert x is not None
    target = problem.tilted_joint
    assert default.kl == pytest.approx(gaussian_kl(x.m, x.C, target.m, target.C), rel=1e-12)
    lines = table(30)
    assert len(lines) == 4 + 6 + 3 + 6
    shown = [line.split(" | ") for line in lines[4:10]]
    plain = [line.strip("| ").split(" | ") for line in lines[13:]]
    assert [row[2] for row in shown] == [row[2] for row in plain]  # the default is Linear's scale 1
    wanted = [f"{c.kl:.3g}" for c in cells if c.scale == 1.0]
    assert plain[2] == ["dps", "SDE", *wanted]
    assert len(wanted) == len(SCHEDULES)
    assert all(float(row[3]) <= float(row[2]) for row in shown)
    there = tmp_path / "table.md"
    there.write_text("mine")
    assert main(["--out", str(there)]) == 2
    assert capsys.readouterr().err.startswith("error: --out: ")
    assert there.read_text() == "mine"
