"""The learned energy: its loss, its levels, and every sampler with an exact energy and with a wrong one."""

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
from torch import Tensor

from lightning_toys.mirror_descent import sample_figures
from lightning_toys.mirror_descent.batched_cholesky import clamped_cholesky
from lightning_toys.mirror_descent.chain_runner import run_chains
from lightning_toys.mirror_descent.energy import (
    EVALUATION_LEVELS,
    EnergyNet,
    LevelMatrix,
    denoising_losses,
    extract_replica,
    score_relative_error,
    training_levels,
)
from lightning_toys.mirror_descent.joint import LinearGaussianJoint
from lightning_toys.mirror_descent.learned import LearnedSampling
from lightning_toys.mirror_descent.learned_table import sampler_table, score_table
from lightning_toys.mirror_descent.model import ExactModel, LearnedModel
from lightning_toys.mirror_descent.problem import Problem
from lightning_toys.mirror_descent.shipped import RULES, SHORT_NAMES
from lightning_toys.nets import ConditionalNet, Network
from lightning_toys.training.noise import keyed_generator
from tests.conftest import Runner
from tests.mirror_descent.test_samplers import LIKE, PROBLEM, SKEW, with_settings

SCORE_BASED = [name for name, make in SHORT_NAMES.items() if make(PROBLEM).reads_score]


class ExactNet(ConditionalNet):
    """The linear f that makes the energy exact: s the scales of z, P the precision, f = (s P s - I) z / abar."""

    def __init__(self, joint: LinearGaussianJoint, factor: float = 1.0) -> None:
        super().__init__()
        self.joint = joint
        self.factor = torch.nn.Parameter(torch.full((1, 1, 1), factor, dtype=torch.float64))

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        assert t is not None
        abar = 1 - t.square()
        eye, C0 = torch.eye(2).to(x), torch.from_numpy(self.joint.clean.C).to(x)
        C = abar[..., None] * C0 + (1 - abar[..., None]) * eye
        s = torch.diagonal(C, dim1=-2, dim2=-1).sqrt()
        M = (s[..., :, None] * torch.linalg.inv(C) * s[..., None, :] - eye) / abar[..., None]
        out: Tensor = self.factor * (M @ x[..., None])[..., 0]
        return out


def exact_energy(problem: Problem, factor: float = 1.0) -> EnergyNet:
    clean = problem.linear_joint.clean
    matrix = LevelMatrix((0,)).double()
    for p in matrix.last.parameters():  # f alone gives the distribution
        p.data.zero_()
    net = EnergyNet(ExactNet(problem.linear_joint, factor), matrix, [0.0, 0.0], [1.0, 1.0])
    net.mean, net.variance = torch.from_numpy(clean.m), torch.from_numpy(np.diag(clean.C).copy())
    return net


def small_net(seeds: tuple[int, ...] = (0, 1)) -> EnergyNet:
    net = Network("film", hidden=8, activation="silu", residual=True).build(seeds, 2, 1, True, 2)
    return EnergyNet(net, LevelMatrix(seeds), [0.1, -0.2], [1.0, 1.1]).double()


def normals(shape: tuple[int, ...], stream: str) -> Tensor:
    return torch.from_numpy(keyed_generator(0, 0, f"test/learned/{stream}").standard_normal(shape))


# the energy


@pytest.mark.parametrize("problem", [PROBLEM, SKEW], ids=["default", "skew"])
def test_exact_energy_matches_closed_form(problem: Problem) -> None:
    net, x = exact_energy(problem), normals((1, 50, 2), "x")
    for value in (1e-3, 0.3, 0.999):
        level = problem.linear_joint.level(value)
        abar = torch.full((1, 50, 1), value, dtype=torch.float64)
        m, P = torch.from_numpy(level.m), torch.from_numpy(level.precision)
        assert torch.allclose(net.score(x, abar)[0], (m - x[0]) @ P, atol=1e-9)
        found = net.log_density(x, abar)[0]
        wanted = -0.5 * (((x[0] - m) @ P) * (x[0] - m)).sum(-1)
        assert torch.allclose(found - found[0], wanted - wanted[0], atol=1e-9)
    for abar in EVALUATION_LEVELS:
        assert float(score_relative_error(net, problem.linear_joint, abar, normals((500, 2), "z"))) < 1e-9
    # an energy whose coordinates are 1 % too independent: the error that it has in closed form
    level = problem.linear_joint.level(0.9)
    D = np.diag(1 / np.diag(level.C)) - level.precision
    error = 0.01 * D @ level.C @ D.T * 0.01
    exact = level.precision
    wanted = math.sqrt(np.trace(error) / np.trace(exact))
    found = float(
        score_relative_error(exact_energy(problem, 0.99), problem.linear_joint, 0.9, normals((200_000, 2), "z"))
    )
    assert found == pytest.approx(wanted, rel=0.01)


def test_pure_noise_is_exact_untrained() -> None:
    net, x = small_net(), normals((2, 20, 2), "x")
    assert torch.allclose(net.score(x, torch.zeros(2, 20, 1, dtype=torch.float64)), -x)


def test_without_the_gaussian_part_f_is_all() -> None:
    """An exact f needs no M."""
    net, x = exact_energy(SKEW), normals((1, 20, 2), "x")
    alone = EnergyNet(ExactNet(SKEW.linear_joint), None, [0.0, 0.0], [1.0, 1.0])
    alone.mean, alone.variance = net.mean, net.variance
    abar = torch.full((1, 20, 1), 0.8, dtype=torch.float64)
    assert torch.allclose(alone.score(x, abar), net.score(x, abar), atol=1e-12)
    assert {n for n, _ in net.named_parameters()} - {n for n, _ in alone.named_parameters()} == {
        f"matrix.{part}.{kind}" for part in ("first", "hidden", "last") for kind in ("weight", "bias")
    }
    assert extract_replica(alone, 0).matrix is None


def test_extract_replica() -> None:
    net, x = small_net(), normals((2, 20, 2), "x")
    abar = torch.full((2, 20, 1), 0.7, dtype=torch.float64)
    both = net.score(x, abar)
    for r in range(2):
        alone = extract_replica(net, r)
        assert torch.allclose(alone.score(x[r : r + 1], abar[:1])[0], both[r], atol=1e-12)
        assert not any(p.requires_grad for p in alone.parameters())


def test_tables_of_a_learned_score() -> None:
    """Learned less exact, intervals that stop at 0, and the chi-squared test that draws are exact."""
    seeds, chains = (0, 1, 2, 3), 1000
    exact = [2.5e-3 * x for x in (0.6, 0.9, 1.1, 1.4)]  # 2 n KL: 5 on average
    metrics = {"joint_kl@mala": [x + 0.001 for x in exact], "joint_kl@mala_exact": exact}
    metrics |= {"action_kl@mala": [0.0, 0.0, 0.0, 0.004], "cond_ratio@mala": [0.9, 1.0, 1.0, 1.1]}
    row = [cell.strip() for cell in sampler_table(metrics, ["mala"], seeds, chains)[2].strip("| ").split("|")]
    assert row[0] == "mala"
    assert row[3].startswith("0.001")
    assert row[4] == "0.0010 [0, 0.0042]"
    total = 2 * chains * sum(metrics["joint_kl@mala"])
    assert float(row[6]) == pytest.approx(float(scipy_stats.chi2.sf(total, 20)), rel=0.05)
    errors = score_table({f"score_error@{abar:g}": [0.1 * abar, 0.2] for abar in EVALUATION_LEVELS})
    assert errors[2] == "| 0.05 | 0.0050, 0.2000 |"
    assert len(errors) == 2 + len(EVALUATION_LEVELS)


# the loss


def test_training_levels() -> None:
    """Half of the rows even in abar, half in log(1 - abar); every place is reached, and none without noise."""
    for offset in (0.0, 0.37, 1 - 2**-24):
        for n in (512, 65, 1023):
            assert training_levels(torch.full((2, 1, 1), offset), n).max() < 1 - 0.9e-4  # in single precision
        abar = training_levels(torch.full((2, 1, 1), offset, dtype=torch.float64), 512)
        assert abar.shape == (2, 512, 1)
        assert abar.min() >= 0
        flat = np.sort(abar[0, ::2, 0].numpy())
        steep = np.sort(-np.log10(1 - abar[0, 1::2, 0].numpy())) / 4
        for x in (flat, steep):
            assert np.allclose(np.diff(x)[:-1], 1 / 256)
            assert 256 * x[0] == pytest.approx(offset, abs=1e-6)
    assert training_levels(torch.full((1, 1, 1), 0.5), 1).item() == 0.5


def test_loss_is_denoising_score_matching() -> None:
    """It is the mean over +-eps of |S + eps / sigma|^2 / 2, less |eps|^2 / (2 sigma^2)."""
    net, x0, eps = small_net(), normals((2, 30, 2), "x0"), normals((2, 30, 2), "eps")
    abar = training_levels(torch.full((2, 1, 1), 0.5, dtype=torch.float64), 30)
    sigma = (1 - abar).sqrt()
    wanted = torch.zeros(2, 30, dtype=torch.float64)
    for sign in (1, -1):
        S = net.score(abar.sqrt() * x0 + sign * sigma * eps, abar)
        wanted += 0.25 * (S + sign * eps / sigma).square().sum(-1)
    wanted -= 0.5 * (eps / sigma).square().sum(-1)
    assert torch.allclose(denoising_losses(net, x0, eps, abar), wanted, atol=1e-8)


@pytest.mark.parametrize("value", [0.3, 0.9, 0.999])
def test_loss_is_minimal_at_the_exact_energy(value: float) -> None:
    """The derivative by a factor on f is 0 at 1, within its error, and not at .9."""
    n = 100_000
    x0 = normals((1, n, 2), "x0") @ torch.from_numpy(np.linalg.cholesky(PROBLEM.linear_joint.clean.C)).T
    eps, abar = normals((1, n, 2), "eps"), torch.full((1, n, 1), value, dtype=torch.float64)

    def derivative(factor: float) -> tuple[float, float]:
        step = 1e-4
        losses = [
            denoising_losses(exact_energy(PROBLEM, f), x0, eps, abar).detach()[0]
            for f in (factor - step, factor + step)
        ]
        each = (losses[1] - losses[0]) / (2 * step)
        return float(each.mean()), float(each.std()) / math.sqrt(n)

    at, error = derivative(1.0)
    assert abs(at) < 4 * error
    below, error = derivative(0.9)
    assert below < -4 * error


def test_antithetic_noise_cancels_variance() -> None:
    """At sigma = .001 the derivative of one pair's loss varies much less than with one-sided noise, as 1 / sigma."""
    n, sigma = 20_000, 1e-3
    x0, eps = normals((1, n, 2), "x0"), normals((1, n, 2), "eps")
    abar = torch.full((1, n, 1), 1 - sigma**2, dtype=torch.float64)
    step = 1e-4
    nets = [exact_energy(PROBLEM, f) for f in (1 - step, 1 + step)]
    ours = [denoising_losses(net, x0, eps, abar).detach()[0] for net in nets]
    x = abar.sqrt() * x0 + sigma * eps
    one_sided = [(net.score(x, abar) + eps / sigma).square().sum(-1)[0] / 2 for net in nets]
    spread = [float(((b - a) / (2 * step)).std()) for a, b in (ours, one_sided)]
    assert spread[1] > 50 * spread[0]


def test_clamped_cholesky() -> None:
    """The Cholesky factor of a covariance; where a pivot is negative it and its column are 0."""
    H = torch.tensor([[[-0.3], [0.1]], [[0.1], [-0.5]]], dtype=torch.float64)
    L = clamped_cholesky(H, 0.5, 2.0)[..., 0]
    assert torch.allclose(L @ L.T, 2 * (torch.eye(2).double() + 0.5 * H[..., 0]))
    bad = clamped_cholesky(torch.tensor([[[-1.2], [0.3]], [[0.3], [-0.5]]]), 1.0, 1.0)
    assert bad.isfinite().all()
    assert bad.abs().max() < 1


# samplers


@pytest.mark.parametrize("problem", [PROBLEM, SKEW], ids=["default", "skew"])
@pytest.mark.parametrize("name", SCORE_BASED)
def test_exact_energy_gives_the_samples_of_the_closed_form(name: str, problem: Problem) -> None:
    """Chain by chain, through every code path of the learned samplers; a wrong energy does not."""
    problem = with_settings(problem, mcmc_steps=3, K=4, predictor_K=6, smc_K=5, smc_particles=2**10, refresh_L=2)
    problem = with_settings(
        problem, smc_twist="dps" if problem.linear_joint is SKEW.linear_joint else "tfg", ess_threshold=0.9
    )
    assert isinstance(problem.model, ExactModel)
    exact, learned, wrong = (
        run_chains(SHORT_NAMES[name](dataclasses.replace(problem, model=model)), [3], 2000, LIKE)[0]
        for model in (ExactModel(), LearnedModel(exact_energy(problem)), LearnedModel(exact_energy(problem, 0.8)))
    )
    # a chain in a million may decide otherwise on a rounding error
    for a, b in ((exact.a, learned.a), (exact.s, learned.s)):
        assert np.mean(np.abs(a - b) > 1e-7) < 1e-3
    assert np.abs(exact.a - wrong.a).max() > 1e-3
    if name == "smc_twisted":
        assert exact.extra is not None
        assert learned.extra is not None
        assert np.allclose(exact.extra["log_z"], learned.extra["log_z"], atol=1e-8)


@pytest.mark.parametrize("rule", list(RULES))
def test_guided_score_of_a_model_matches_closed_form(rule: str) -> None:
    x = normals((2, 40), "x")
    guide = RULES[rule](SKEW.linear_joint, SKEW.reward, SKEW.lambda_scale)
    for abar in (0.01, 0.6, 0.99, 1.0):
        level = SKEW.linear_joint.level(abar)
        G, g = guide.affine_term(level, 0.7)
        wanted = torch.from_numpy((G - level.precision) @ x.numpy() + (g + level.precision @ level.m)[:, None])
        for model in (ExactModel(), LearnedModel(exact_energy(SKEW))):
            assert torch.allclose(guide.guided_score(model, level, 0.7, x), wanted, atol=1e-7)


# through the command line


TINY = (
    *("--model.seeds", "[0,1]", "--model.chains", "300", "--model.network.hidden", "8", "--figures.dpi", "20"),
    *("--model.settings.mcmc_steps", "2", "--model.settings.predictor_K", "3", "--model.settings.smc_K", "3"),
    *("--model.settings.smc_particles", "64"),
    *("--model.settings.K", "2", "--model.settings.action_steps_per_level", "1", "--data.batch_size", "64"),
)


@pytest.fixture
def mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path / "logs", capsys, "mirror_descent", TINY)


@pytest.mark.slow  # tests/test_matrix.py has every verb in the gate, without figures
def test_outputs(mirror: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_figures, "FRAMES", 3)  # each costs a tenth of a second
    mirror.ok("fit", "learned", "--trainer.max_steps", "20", "--trainer.val_check_interval", "10")
    err = mirror.ok("test", "learned", "--model.samplers", "[pc_mala,sde_dps]", "--model.gif", "true")
    folder = mirror.folder("learned")
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["metrics"]
    assert {"score_error", "score_error@0.999", "joint_kl@pc_mala", "joint_kl@pc_mala_exact", "joint_kl"} <= set(found)
    assert found["joint_kl"]["values"] == found["joint_kl@pc_mala"]["values"]
    worst = [max(found[f"score_error@{abar:g}"]["values"][r] for abar in EVALUATION_LEVELS) for r in range(2)]
    assert found["score_error"]["values"] == worst
    names = {p.name for p in (folder / "figures").iterdir()}
    assert {"score_error.png", "learned_and_exact.png", "frontier.png", "anim_pc_mala.gif"} <= names
    assert "| sampler | joint KL, learned |" in (folder / "facts.md").read_text()
    assert "| sde_dps |" in err
    # metrics with the closed form are those of the untrained module
    solo = Runner(mirror.root, mirror.capture, "mirror_descent", (*TINY[:4], *TINY[-6:-2]))
    solo.ok("test", "analytic", "--model.samplers", "[pc_mala]", "--figures.enabled", "false", *(
        "--model.settings.refresh_L", "0", "--model.settings.smc_particles", "64"))  # fmt: skip
    other = json.loads((mirror.folder("analytic") / "results.json").read_text())["metrics"]
    assert other["joint_kl@pc_mala"]["values"] == found["joint_kl@pc_mala_exact"]["values"]
    mirror.ok("predict", "learned", "--model.samplers", "[mala]")
    with np.load(folder / "predictions.npz") as drawn:
        assert drawn["mala"].shape == drawn["mala_exact"].shape == (2, 300, 2)


@pytest.mark.slow  # the loss and its minimum are held below
def test_training_reduces_score_error(mirror: Runner) -> None:
    """Two seconds of training reduce the error from about .9 to less than .15."""
    mirror.small = ("--figures.enabled", "false", "--data.batch_size", "256", "--model.seeds", "[5]")
    mirror.ok("fit", "learned", "--trainer.max_steps", "800", "--model.ema_decay", "0.98")
    found = json.loads((mirror.folder("learned") / "results.json").read_text())["metrics"]
    assert found["score_error"]["values"][0] < 0.15


def weights(mirror: Runner, name: str) -> dict[str, Tensor]:
    path = mirror.folder("learned", name) / "checkpoints" / "last.ckpt"
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


CONSTANT_RATE = (
    *("--trainer.val_check_interval", "20", "--figures.enabled", "false", "--model.lr_decay", "constant"),
    *("--model.optimizer", "adamw"),
)


def test_a_checkpoint_without_the_gaussian_part(mirror: Runner) -> None:
    """It is read as it was trained, whatever the configuration has; with M asked for it is refused in one line."""
    off = ("--figures.enabled", "false", "--model.gaussian_part", "false")
    mirror.ok("fit", "learned", *off, "--trainer.max_steps", "2", "--run.name", "alone")
    assert not [name for name in weights(mirror, "alone") if ".matrix." in name]
    mirror.ok("test", "learned", *off, "--model.samplers", "[mala]", "--run.name", "alone")
    module = LearnedSampling.load_from_checkpoint(mirror.folder("learned", "alone") / "checkpoints" / "last.ckpt")
    assert module.evaluated_net.matrix is None
    said = mirror.ok("test", "learned", *off[:2], "--model.samplers", "[mala]", "--run.name", "alone")
    assert "--model.gaussian_part is False as in the checkpoint, not True as in the configuration" in said
    code, err = mirror.code("test", "learned", *off[:3], "true", "--run.name", "alone")
    assert (code, "net.matrix.first.weight" in err, "--model.gaussian_part" in err) == (2, True, True)


@pytest.mark.slow  # the package's doing; other experiments' are in the gate
def test_replica_is_the_solo_run(mirror: Runner) -> None:
    for name, seeds in (("both", "[0,1]"), ("solo", "[1]")):
        mirror.ok(
            "fit", "learned", *CONSTANT_RATE, "--trainer.max_steps", "100", "--model.seeds", seeds, "--run.name", name
        )
    both, solo = weights(mirror, "both"), weights(mirror, "solo")
    for name, p in solo.items():
        if name.startswith("net.net."):
            assert torch.allclose(both[name][1], p[0], atol=1e-5), name


@pytest.mark.slow  # the package's doing; other experiments' are in the gate
def test_resume_is_bitwise(mirror: Runner) -> None:
    mirror.ok("fit", "learned", *CONSTANT_RATE, "--trainer.max_steps", "20", "--run.name", "parts")
    mirror.ok(
        "fit", "learned", *CONSTANT_RATE, "--trainer.max_steps", "40", "--run.name", "parts", "--ckpt_path", "last"
    )
    mirror.ok("fit", "learned", *CONSTANT_RATE, "--trainer.max_steps", "40", "--run.name", "whole")
    parts, whole = weights(mirror, "parts"), weights(mirror, "whole")
    assert parts.keys() == whole.keys()
    assert parts
    for name in parts:
        assert torch.equal(parts[name], whole[name]), name


@pytest.mark.slow  # test_matrix.py has each precision in the gate
def test_half_precision_leaves_the_score_out_of_autocast(mirror: Runner) -> None:
    """The loss takes small differences of scores, and so stays out of autocast: the same weights, bit for bit."""
    flags = ("--trainer.max_steps", "10", "--figures.enabled", "false", "--model.optimizer", "adamw")
    mirror.ok("fit", "learned", *flags, "--run.name", "full")
    mirror.ok("fit", "learned", *flags, "--trainer.precision", "bf16-mixed", "--run.name", "mixed")
    full, mixed = weights(mirror, "full"), weights(mirror, "mixed")
    assert full
    for name in full:
        assert torch.equal(full[name], mixed[name]), name
    # and so do the samplers
    drawn = ("--model.samplers", "[pc_mala,sde_dps]", "--figures.enabled", "false", "--run.name", "full")
    mirror.ok("test", "learned", *drawn)
    path = mirror.folder("learned", "full") / "results.json"
    full_metrics = json.loads(path.read_text())["metrics"]
    mirror.ok("test", "learned", *drawn, "--trainer.precision", "bf16-mixed")
    assert json.loads(path.read_text())["metrics"] == full_metrics


def test_input_scales_are_those_of_training(mirror: Runner) -> None:
    """Other data in `test` change the target, not the energy's input scales: the score's error is large."""
    mirror.ok("fit", "learned", "--trainer.max_steps", "5", "--figures.enabled", "false")
    mirror.ok("test", "learned", "--model.samplers", "[pc_mala]", "--data.mu_a", "5", "--figures.enabled", "false")
    found = json.loads((mirror.folder("learned") / "results.json").read_text())["metrics"]
    assert min(found["score_error@0.999"]["values"]) > 1.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model.samplers", "[gibbs]"), "'gibbs' is not allowed here, it reads no score"),
        (("--model.samplers", "[pc_malla]"), "did you mean 'pc_mala'"),
        (("--model.network.kind", "transformer"), "'transformer' is not allowed here"),
        (("--model.network.activation", "relu"), "'relu' is not allowed here"),
        (("--trainer.precision", "bf16-true"), "--trainer.precision: a half precision throughout"),
        (("--model.samplers", "mala"), "give a list such as '[0, 1]' or null"),
        (("--model.chains", "3"), "--model.chains: 3 is not allowed"),
    ],
    ids=lambda x: x[-1] if isinstance(x, tuple) else "",
)
def test_bad_input(mirror: Runner, flags: tuple[str, ...], words: str) -> None:
    code, err = mirror.code("fit", "learned", *flags)
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow  # tests/test_matrix.py has two ranks in the gate
def test_two_processes_are_one(mirror: Runner) -> None:
    """Batches, levels and chains are distributed over gloo ranks; an odd batch, of which one rank has a row more."""
    flags = (*CONSTANT_RATE, "--trainer.max_steps", "50", "--data.batch_size", "65", "--trainer.accelerator", "cpu")
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
    mirror.ok("fit", "learned", *flags, "--run.name", "one")
    process = mirror.start("fit", "learned", *flags, *ddp, "--run.name", "two")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    one, two = weights(mirror, "one"), weights(mirror, "two")
    assert max(float((one[k] - two[k]).abs().max()) for k in one if k.startswith("net.")) < 2e-6

    drawn = ("--model.samplers", "[pc_mala,sde_tfg]", "--model.chains", "40000", "--run.name", "one")
    mirror.ok("test", "learned", *drawn)
    results = mirror.folder("learned", "one") / "results.json"
    alone = json.loads(results.read_text())
    process = mirror.start("test", "learned", *drawn, *ddp, "--trainer.accelerator", "cpu")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(results.read_text())["metrics"] == alone["metrics"]


@pytest.mark.slow  # test_matrix.py has each precision in the gate
def test_double_precision(mirror: Runner) -> None:
    flags = ("--trainer.precision", "64-true", "--figures.enabled", "false", "--trainer.max_steps", "5")
    mirror.ok("fit", "learned", *flags)
    assert weights(mirror, "version_0")["net.net.first.weight"].dtype == torch.float64
    mirror.ok("test", "learned", *flags[:4], "--model.samplers", "[pc_joint_mala,smc_twisted,sde_dps]")
    found = json.loads((mirror.folder("learned") / "results.json").read_text())["metrics"]
    for name in ("pc_joint_mala", "smc_twisted", "sde_dps"):
        assert found[f"joint_kl@{name}"]["mean"] > found[f"joint_kl@{name}_exact"]["mean"]  # untrained
