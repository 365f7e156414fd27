"""forward, log_density and sample without a Trainer: the numbers of the run, refusals, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_toys import mirror_descent
from lightning_toys.errors import ToyError
from lightning_toys.mirror_descent import (
    ActionValue,
    LateRamp,
    LearnedSampling,
    LinearGaussian,
    Settings,
    TFGPlusFinalMALA,
    TiltedSampling,
)
from lightning_toys.mirror_descent.energy import EVALUATION_LEVELS
from lightning_toys.mirror_descent.hparams import from_hparam, to_hparam
from lightning_toys.mirror_descent.learned import NUM_SCORE_SAMPLES
from lightning_toys.mirror_descent.schedules import Linear, Schedule
from lightning_toys.mirror_descent.shipped import SHORT_NAMES as SAMPLERS
from lightning_toys.mirror_descent.tilt import Quadratic, Reward, StateReward
from lightning_toys.nets import Network
from lightning_toys.training.noise import keyed_generator
from tests.conftest import Runner

WORK = (
    *("--model.settings.mcmc_steps", "3", "--model.settings.predictor_K", "4", "--model.settings.smc_K", "3"),
    *("--model.settings.smc_particles", "64", "--model.settings.K", "3", "--model.settings.refresh_L", "1"),
    *("--model.seeds", "[3,1]", "--model.chains", "300", "--figures.enabled", "false"),
)
# nothing here is a default, so that whatever a checkpoint did not bring back would show
OTHERWISE = (
    *("--model.reward", "ActionValue", "--model.reward.mu_q", "0.7", "--model.schedule", "TFGPlusFinalMALA"),
    *("--model.schedule.final_steps", "2", "--model.lambda_scale", "1.1", "--data.mu_a", "0.3"),
)
LEARNED = (
    *("--model.network.hidden", "8", "--model.ema_decay", "0.8", "--data.batch_size", "64"),
    *("--trainer.max_steps", "20"),
)
DATA = LinearGaussian(mu_a=0.3, batch_size=64)


@pytest.fixture
def mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path / "logs", capsys, "mirror_descent", (*WORK, *OTHERWISE))


def metrics(folder: Path) -> dict[str, list[float]]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["metrics"]
    return {k: v["values"] for k, v in found.items()}


def pairs(seed: int, rows: int) -> Tensor:
    return torch.from_numpy(keyed_generator(seed, 0, "test/inference").standard_normal((rows, 2), np.float32))


def untrained(**options: Any) -> LearnedSampling:
    """A network as it was initialised, built without a Trainer."""
    module = LearnedSampling(seeds=[3, 1], network=Network("film", hidden=8, activation="silu"), **options)
    module.sizes = module.measure(DATA)
    module.configure_model()
    return module


def from_checkpoint(path: Path, **options: Any) -> LearnedSampling:
    module: LearnedSampling = LearnedSampling.load_from_checkpoint(
        path, map_location="cpu", weights_only=True, **options
    )
    return module


@pytest.mark.slow
def test_loaded_module_has_the_numbers_of_the_run(mirror: Runner) -> None:
    mirror.ok("fit", "learned", *LEARNED)
    folder = mirror.folder("learned")
    module = from_checkpoint(folder / "checkpoints" / "last.ckpt")
    z = torch.from_numpy(keyed_generator(0, 0, "evaluation/score").standard_normal((NUM_SCORE_SAMPLES, 2), np.float32))
    fitted = metrics(folder)
    for abar in EVALUATION_LEVELS:
        level = DATA.joint.level(abar)
        m, C, P = (torch.from_numpy(v).to(z) for v in (level.m, level.C, level.precision))
        x = m + z @ torch.linalg.cholesky(C).T
        exact = (m - x) @ P
        errors = ((module(x, abar) - exact).square().sum((1, 2)) / exact.square().sum()).sqrt()
        assert errors.tolist() == fitted[f"score_error@{abar:g}"]
    # those of the averaged weights
    assert module.ema_net is not None
    x, levels = pairs(0, 5).expand(2, -1, -1), torch.full((2, 5, 1), 0.7)
    averaged, raw = (net.score(x, levels).detach() for net in (module.ema_net, module.net))  # type: ignore[operator]
    assert torch.equal(module(x, 0.7), averaged)
    assert not torch.allclose(averaged, raw, atol=1e-6)

    labels = ("pc_mala", "pc_mala_exact", "smc_twisted", "smc_twisted_exact")
    chosen = ("--model.samplers", "[pc_mala,smc_twisted]")
    mirror.ok("predict", "learned", *LEARNED[:-2], *chosen)
    mirror.ok("test", "learned", *LEARNED[:-2], *chosen)
    tested = metrics(folder)
    with np.load(folder / "predictions.npz") as predicted:
        for label in labels:
            sample = module.sample(label, data=DATA)
            assert sample.shape == (2, 300, 2)
            assert np.array_equal(sample.numpy(), predicted[label]), label
            np.testing.assert_allclose(sample[..., 0].mean(1), tested[f"action_mean@{label}"], rtol=1e-12)
    assert not torch.allclose(module.sample("pc_mala", data=DATA), module.sample("pc_mala_exact", data=DATA))


def test_double_precision_is_kept(mirror: Runner) -> None:
    double = ("--trainer.precision", "64-true", "--model.samplers", "[mala]")
    mirror.ok("fit", "learned", *LEARNED, *double)
    mirror.ok("predict", "learned", *LEARNED[:-2], *double)
    folder = mirror.folder("learned")
    module = from_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert module(pairs(0, 3), 0.5).dtype == torch.float64
    assert module(torch.ones(3, 2, dtype=torch.int64), 0.5).dtype == torch.float64
    with np.load(folder / "predictions.npz") as predicted:
        for label in ("mala", "mala_exact"):
            assert np.array_equal(module.sample(label, data=DATA).numpy(), predicted[label]), label


def test_sample_is_what_predict_and_test_draw(mirror: Runner) -> None:
    mirror.ok("predict", "analytic", "--run.name", "predicted")
    mirror.ok("test", "analytic", "--model.sweep_max_refresh", "0", "--run.name", "tested")
    tested = metrics(mirror.folder("analytic", "tested"))
    settings = Settings(K=3, refresh_L=1, mcmc_steps=3, predictor_K=4, smc_K=3, smc_particles=64)
    module = TiltedSampling(
        seeds=[3, 1],
        reward=ActionValue(mu_q=0.7),
        schedule=TFGPlusFinalMALA(final_steps=2),
        lambda_scale=1.1,
        chains=300,
        settings=settings,
    )
    with np.load(mirror.folder("analytic", "predicted") / "predictions.npz") as predicted:
        assert set(SAMPLERS) <= set(predicted)
        for name in SAMPLERS:
            sample = module.sample(name, data=DATA)
            assert sample.dtype == torch.float64
            assert np.array_equal(sample.numpy(), predicted[name]), name
            np.testing.assert_allclose(sample[..., 1].mean(1), tested[f"state_mean@{name}"], rtol=1e-12)
    # of more chains the first are the same, and a replica does not depend on the others
    assert torch.equal(module.sample("mala", 500, DATA)[:, :300], module.sample("mala", data=DATA))
    both = module.sample("mala", data=DATA)
    module.seeds = [1]
    assert torch.equal(module.sample("mala", data=DATA)[0], both[1])


@pytest.mark.slow  # tests/docs runs this experiment's script in the gate
def test_after_fit_in_python(tmp_path: Path) -> None:
    """By a Trainer and without the command line: the module goes on as it is, and so does its checkpoint."""
    module = LearnedSampling(
        seeds=[3, 1],
        network=Network("film", hidden=8, activation="silu"),
        reward=ActionValue(),
        chains=200,
        samplers=["mala"],
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=3, accelerator="cpu", logger=False, default_root_dir=tmp_path, val_check_interval=3,
                      check_val_every_n_epoch=None, num_sanity_val_steps=0, **quiet)  # fmt: skip
    trainer.fit(module, LinearGaussian(mu_a=0.3, batch_size=64))
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    loaded = from_checkpoint(tmp_path / "three.ckpt")
    x = pairs(0, 7)
    assert torch.equal(loaded(x, 0.3), module(x, 0.3))
    assert not torch.equal(loaded(x, 0.3), untrained()(x, 0.3))
    sample = module.sample("mala")  # the Trainer's data
    assert torch.equal(loaded.sample("mala", data=DATA), sample)
    assert not torch.equal(
        from_checkpoint(tmp_path / "three.ckpt", reward=StateReward()).sample("mala", data=DATA), sample
    )


@pytest.mark.slow
def test_shapes_that_fit() -> None:
    module, x = untrained(), pairs(0, 6)
    score = module(x, 0.4)
    assert score.shape == (2, 6, 2)
    assert not score.requires_grad
    assert torch.equal(module(x.expand(2, -1, -1), 0.4), score)
    for abar in (torch.tensor(0.4), torch.full((6,), 0.4), torch.full((2, 6), 0.4)):
        assert torch.equal(module(x, abar), score)
        assert torch.equal(module.log_density(x, abar), module.log_density(x, 0.4))
    assert not torch.allclose(score[0], score[1])  # two replicas
    other = torch.stack([x, pairs(1, 6)])
    assert torch.equal(module(other, 0.4)[0], score[0])
    levels = torch.linspace(0, 1, 6)
    for i, level in enumerate(levels):
        assert torch.allclose(module(x, levels)[:, i], module(x, float(level))[:, i], atol=1e-6)
    assert module(x[:0], 0.4).shape == (2, 0, 2)
    with torch.inference_mode():
        assert torch.equal(module(x + 0, 0.4), score)
        assert torch.equal(module.log_density(x + 0, 0.4), module.log_density(x, 0.4))
        assert torch.equal(module.sample("mala", 100, DATA), module.sample("mala", 100, DATA))


def test_score_is_the_gradient_of_log_density() -> None:
    module, h = untrained().double(), 1e-5
    x, levels = pairs(0, 20).double(), torch.linspace(0.05, 0.99, 20)
    steps = h * torch.eye(2).double()
    found = [(module.log_density(x + d, levels) - module.log_density(x - d, levels)) / (2 * h) for d in steps]
    assert torch.allclose(torch.stack(found, -1), module(x, levels), atol=1e-7)
    assert float(module(x, levels).abs().min()) > 1e-6
    # pure noise is exact without training
    assert torch.allclose(module(x, 0.0), -x.expand(2, -1, -1))
    assert torch.allclose(module.log_density(x, 0.0), -0.5 * x.square().sum(-1).expand(2, -1))


REFUSED: dict[str, tuple[Callable[[LearnedSampling], Any], str]] = {
    "one pair": (lambda m: m(torch.zeros(2), 0.5), "x: shape (2,) is not allowed; give (M, 2) or (2, M, 2)"),
    "triples": (lambda m: m(torch.zeros(4, 3), 0.5), "x: shape (4, 3) is not allowed"),
    "replicas": (lambda m: m(torch.zeros(3, 4, 2), 0.5), "x: shape (3, 4, 2) is not allowed"),
    "axes": (lambda m: m.log_density(torch.zeros(1, 2, 4, 2), 0.5), "x: shape (1, 2, 4, 2) is not allowed"),
    "levels": (
        lambda m: m(torch.zeros(4, 2), torch.rand(3)),
        "abar: shape (3,) is not allowed; give a number, (4,) or",
    ),
    "level axis": (lambda m: m(torch.zeros(4, 2), torch.rand(2, 4, 1)), "abar: shape (2, 4, 1) is not allowed"),
    "above 1": (lambda m: m(torch.zeros(4, 2), 1.5), "abar: a value is not allowed; give numbers in [0, 1]"),
    "no number": (lambda m: m.log_density(torch.zeros(4, 2), math.nan), "abar: a value is not allowed"),
    "no data": (lambda m: m.sample("mala"), "sample: no data are attached; give data=LinearGaussian(...)"),
    "no chains": (lambda m: m.sample("mala", 0, DATA), "sample: chains=0 is not allowed; give an integer >= 1"),
    "sampler": (lambda m: m.sample("pc_malla", 10, DATA), "did you mean 'pc_mala'?"),
    "no score": (lambda m: m.sample("gibbs", 10, DATA), "'gibbs' is not allowed here, it reads no score"),
    "few chains": (lambda m: m.sample("smc_twisted", 10, DATA), "10 is not allowed with smc_twisted; give at least"),
    "exact twice": (lambda m: m.sample("mala_exact_exact", 10, DATA), "'mala_exact' is not allowed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(ToyError) as caught:
        call(untrained())
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_without_a_network() -> None:
    module = LearnedSampling()
    for call in (lambda: module(torch.zeros(1, 2), 0.5), lambda: module.sample("mala", 10, DATA)):
        with pytest.raises(ToyError, match=r"not built yet; load a checkpoint, or set sizes = measure\(data\)"):
            call()
    with pytest.raises(ToyError, match="'mala_exact' is not allowed"):
        TiltedSampling().sample("mala_exact", 10, DATA)
    with pytest.raises(ToyError, match=r"ula_step: 0.6 is not allowed here, ula would run away"):
        TiltedSampling(settings=Settings(ula_step=0.6)).sample("ula", 10, DATA)


class Sharp(Reward):
    """Somebody's own reward."""

    def action_value(self, level: Any) -> Quadratic:
        return Quadratic(5.0, 0.0, 0.0)


def test_hyper_parameters_rebuild_the_module(tmp_path: Path) -> None:
    own: list[tuple[type[Any], Any]] = [(Reward, StateReward(0.3, 0.1, 0.7, 2.0)), (Reward, ActionValue(0.4, -1.0))]
    kinds = [getattr(mirror_descent, name) for name in mirror_descent.__all__]
    own += [(Schedule, k()) for k in kinds if isinstance(k, type) and issubclass(k, Schedule) and k is not Schedule]
    assert len(own) == 8
    for base, value in own:
        plain = json.loads(json.dumps(to_hparam(value)))
        again = from_hparam(base, plain, "name", Linear())
        assert type(again) is type(value)
        assert vars(again) == vars(value)

    trained_with = {"reward": Sharp(), "schedule": LateRamp(ramp_p=3.0), "settings": Settings(K=7), "lambda_scale": 0.4}
    module = untrained(**trained_with)
    checkpoint = {"state_dict": module.state_dict(), "global_step": 0, "pytorch-lightning_version": "2.6.0",
                  "toy": {"sizes": module.sizes}, "hyper_parameters": dict(module.hparams)}  # fmt: skip
    torch.save(checkpoint, tmp_path / "sharp.ckpt")
    with pytest.raises(
        ToyError, match=r"^reward: the checkpoint was made with .*test_inference\.Sharp; give it"
    ) as caught:
        from_checkpoint(tmp_path / "sharp.ckpt")
    assert len(str(caught.value).splitlines()) == 1
    loaded = from_checkpoint(tmp_path / "sharp.ckpt", reward=Sharp())
    assert loaded.hparams == module.hparams
    assert isinstance(loaded.schedule, LateRamp)
    assert (loaded.schedule.ramp_p, loaded.settings, loaded.lambda_scale) == (3.0, Settings(K=7), 0.4)
    assert torch.equal(loaded.sample("pc_mala", 100, DATA), module.sample("pc_mala", 100, DATA))
