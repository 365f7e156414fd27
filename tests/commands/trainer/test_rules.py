"""Flags that would do something else here than they say, or nothing: refused, or told of."""

from __future__ import annotations

import io
import logging
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_toys.training.metrics_reader import read_csv
from tests.conftest import REPO, Runner
from tests.shipped import tiny

REFUSED = (
    ("--trainer.check_val_every_n_epoch 2", "one epoch", "--trainer.val_check_interval"),
    ("--trainer.min_epochs 2", "one epoch", "--trainer.min_steps"),
    ("--trainer.enable_checkpointing false", "last.ckpt", "--checkpoint.every_n_steps"),
    ("--trainer.default_root_dir /tmp/nowhere", "nowhere", "--run.root"),
    ("--trainer.gradient_clip_algorithm value", "norm", "--model.clip_grad_norm"),
    ("--trainer.barebones true", "results", "--trainer.logger false"),
    ("--trainer.reload_dataloaders_every_n_epochs 1", "one epoch"),
    ("--trainer.precision 16-mixed", "--trainer.precision: '16-mixed'", "bf16-mixed"),
    ("--trainer.strategy fsdp --trainer.devices 2", "--trainer.strategy: 'fsdp'", "cuts up parameters", "give ddp"),
    ("--trainer.strategy deepspeed_stage_2", "--trainer.strategy: 'deepspeed_stage_2'", "give ddp"),
    ("--trainer.strategy ddp_spawn --trainer.devices 2", "--trainer.strategy: 'ddp_spawn'", "give ddp"),
    ("--trainer.strategy DDPStrategy --trainer.strategy.start_method spawn", "'DDPStrategy'", "give ddp"),
    ("--trainer.callbacks LearningRateMonitor", "LearningRateMonitor", "train/lr"),
    ("--trainer.callbacks EMAWeightAveraging", "EMAWeightAveraging", "--model.ema_decay"),
    ("--trainer.callbacks LearningRateFinder", "LearningRateFinder", "--model.lr"),
    ("--trainer.callbacks DeviceStatsMonitor", "DeviceStatsMonitor"),
    ("--trainer.callbacks EarlyStopping", "EarlyStopping needs monitor", "--trainer.callbacks.monitor"),
    (
        "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor eval/l3",
        "--trainer.callbacks.monitor: 'eval/l3' of EarlyStopping is not measured",
        "did you mean 'eval/l2'?",
    ),
    ("--seed_everything 7", "--seed_everything: 7", "--model.seeds"),
    ("--trainer.max_time 00:00:00:00", "--trainer.max_time: '00:00:00:00'", "give DD:HH:MM:SS"),
    ("--trainer.max_time 1:2", "--trainer.max_time: '1:2'", "give DD:HH:MM:SS"),
    ("--trainer.max_time '{days: 1180591620717411303424}'", "--trainer.max_time: {'days': 11805", "give DD:HH:MM:SS"),
    ("--trainer.max_time '{dayz: 1}'", "--trainer.max_time: {'dayz': 1}", "give DD:HH:MM:SS"),
    ("--model.network.kind film --model.network.layers 1", "--model.network.layers: 1", "at least 2"),
    ("--model.mode regression --model.t_star 5", "--model.t_star: 5.0"),
    ("--figures.enabled true --figures.every_n_validations 1 --trainer.logger false", "TensorBoardLogger"),
)


@pytest.mark.parametrize(("line", "parts"), [(x[0], x[1:]) for x in REFUSED], ids=[x[0] for x in REFUSED])
def test_a_setting_that_would_mislead_is_refused(runner: Runner, line: str, parts: tuple[str, ...]) -> None:
    code, err = runner.code("fit", "flow", "--trainer.max_steps", "2", *shlex.split(line))
    assert code == 2, err
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    for part in parts:
        assert part in err
    assert not list(runner.root.rglob("*"))


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("detect_anomaly", "true or false"), ("num_nodes", "an integer"), ("overfit_batches", "a number or an integer")],
)
def test_null_where_the_trainer_wants_a_value(runner: Runner, name: str, allowed: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"trainer: {{{name}: null}}\n")
    code, err = runner.code("fit", "flow", "-c", str(tmp_path / "mine.yaml"), "--trainer.max_steps", "2")
    assert code == 2
    assert err == f"error: --trainer.{name}: null is not allowed; give {allowed}\n"
    assert not list(runner.root.rglob("*"))


def test_verbs_that_would_do_nothing_are_refused(runner: Runner) -> None:
    runner.ok("fit", "flow", "--trainer.max_steps", "2")
    for verb, line, part in (
        ("test", "--trainer.limit_test_batches 0", "--trainer.limit_test_batches: 0"),
        ("validate", "--trainer.limit_val_batches 0", "--trainer.limit_val_batches: 0"),
        ("predict", "--trainer.limit_predict_batches 0", "--trainer.limit_predict_batches: 0"),
        ("predict", "--return_predictions false", "--return_predictions: False"),
    ):
        code, err = runner.code(verb, "flow", "--ckpt_path", "last", *line.split())
        assert code == 2
        assert part in err
    said = runner.ok("fit", "flow", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0")
    assert "--trainer.limit_val_batches 0: no validation" in said


def test_the_data_of_every_step_have_no_epochs(policies: Runner) -> None:
    code, err = policies.code("fit", "meanflow", "--trainer.max_epochs", "1", "--trainer.max_steps", "2")
    assert code == 2
    assert "--trainer.max_epochs: 1 is not allowed" in err


def test_a_gaussian_without_a_condition_has_no_film(policies: Runner) -> None:
    bandit = "configs/generative_policy/bandit.yaml"
    code, err = policies.raw("fit", "-c", bandit, "--model.policy", "gaussian", "--model.network.kind", "film")
    assert code == 2
    assert "--model.network.kind: 'film' is not allowed with --model.policy gaussian" in err


def test_the_training_loss_can_be_monitored(runner: Runner) -> None:
    stop = ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "train/loss")
    flags = ("--trainer.max_steps", "60", "--trainer.val_check_interval", "10", "--model.lr", "1e-12")
    runner.ok("fit", "flow", *flags, *stop, "--trainer.callbacks.patience", "0", "--trainer.callbacks.min_delta", "9")
    assert runner.checkpoint("flow")["global_step"] == 20
    rows = read_csv(runner.folder("flow") / "metrics.csv")
    assert [int(r["step"]) for r in rows if r["eval/l2"]] == [10, 20]  # the look before the training leaves none


MONITORED = (
    ("flow_vs_regression/mip", "eval/l2"),
    ("generative_policy/gaussian", "eval/kl"),
    ("generative_policy/bandit", "eval/regret"),
    ("mirror_descent/learned", "train/loss"),
    ("bilevel/regression", "eval/outer_loss"),
    ("bilevel/control", "eval/td_error"),
    ("update_entropy/arithmetic", "eval/reward"),
)


GATE = ("flow_vs_regression/mip", "generative_policy/gaussian", "bilevel/regression", "bilevel/control")


@pytest.mark.parametrize(
    ("config", "monitor"),
    [pytest.param(*x, marks=[] if x[0] in GATE else [pytest.mark.slow], id=x[0]) for x in MONITORED],
)
def test_every_experiment_can_be_monitored(config: str, monitor: str, runner: Runner) -> None:
    """The look before training changes nothing; what only later validations measure may be monitored too."""
    if config == "bilevel/control":
        pytest.importorskip("gymnasium")
    experiment, variant = config.split("/")
    here = Runner(runner.root, runner.capture, experiment, tiny(REPO / "configs" / f"{config}.yaml"))
    flags = ("--trainer.max_steps", "6", "--trainer.val_check_interval", "6", "--figures.enabled", "false")
    if config == "mirror_descent/learned":
        flags = (*flags, "--trainer.limit_val_batches", "1")
    here.ok("fit", variant, *flags)
    here.ok("fit", variant, *flags, "--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", monitor)
    rows = [read_csv(here.folder(variant, f"version_{k}") / "metrics.csv") for k in (0, 1)]
    assert rows[0] == rows[1]
    wrong = ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "eval/nothing")
    code, err = here.code("fit", variant, *flags, *wrong)
    assert code == 2
    assert "'eval/nothing' of EarlyStopping is not measured" in err
    assert ("train/loss" in err) == (config != "bilevel/control")
    assert not here.folder(variant, "version_2").exists()


def test_monitors_of_a_resumed_run_are_looked_at(runner: Runner) -> None:
    """There is no look before its first step: it ends at its first validation, in one line."""
    runner.ok("fit", "flow", "--trainer.max_steps", "10")
    stop = ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "holdout_l2")
    code, err = runner.code("fit", "flow", "--trainer.max_steps", "20", "--ckpt_path", "last", *stop)
    assert code == 2
    assert "'holdout_l2' of EarlyStopping is not measured" in err
    code, err = runner.code("fit", "flow", "--trainer.max_steps", "4", *stop, "--trainer.limit_val_batches", "0")
    assert code == 2
    assert "--trainer.limit_val_batches: 0 is not allowed with EarlyStopping" in err
    assert runner.ok("fit", "flow", "--trainer.max_steps", "4", *stop, "--trainer.callbacks.strict", "false")


def test_lightnings_checkpoints_come_at_their_steps(runner: Runner) -> None:
    flags = ("--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", "30")
    runner.ok("fit", "flow", "--trainer.max_steps", "100", *flags, "--trainer.callbacks.save_top_k=-1")
    found = {
        torch.load(p, weights_only=True)["global_step"]
        for p in (runner.folder("flow") / "checkpoints").glob("*step*.ckpt")
    }
    assert found == {30, 60, 90}


def test_a_rate_that_changes_is_written(policies: Runner) -> None:
    flags = ("--trainer.max_steps", "8", "--trainer.log_every_n_steps", "2", "--model.lr", "0.001")
    policies.ok("fit", "meanflow", *flags, "--model.lr_decay", "cosine")
    rows = read_csv(policies.folder("meanflow") / "metrics.csv")
    rates = torch.tensor([float(r["train/lr"]) for r in rows if r["train/lr"]], dtype=torch.float64)
    used = torch.tensor([1, 3, 5, 7], dtype=torch.float64)  # of optimiser steps 2, 4, 6, 8
    assert torch.allclose(rates, 0.0005 * (1 + torch.cos(torch.pi * used / 8)), rtol=1e-6)
    policies.ok("fit", "meanflow", *flags, "--model.lr_decay", "constant", "--run.name", "constant")
    assert "train/lr" not in read_csv(policies.folder("meanflow", "constant") / "metrics.csv")[0]


def test_a_profile_is_printed(runner: Runner) -> None:
    said = io.StringIO()
    handler = logging.StreamHandler(said)  # Lightning's own has the standard error of when it was imported
    logging.getLogger("lightning.pytorch").addHandler(handler)
    try:
        runner.ok("fit", "flow", "--trainer.max_steps", "2", "--trainer.profiler", "simple")
    finally:
        logging.getLogger("lightning.pytorch").removeHandler(handler)
    assert "run_training_epoch" in said.getvalue()


def test_a_run_within_its_warm_up_says_so(runner: Runner) -> None:
    pytest.importorskip("gymnasium")
    control = Runner(runner.root, runner.capture, "bilevel", tiny(REPO / "configs/bilevel/control.yaml"))
    assert "nothing will be learned: --trainer.max_steps 3" in control.ok("fit", "control", "--trainer.max_steps", "3")
    assert "will be learned" not in control.ok("fit", "control", "--trainer.max_steps", "5")


# settings of one mode in another

# configuration, settings, and flags that then do nothing
UNUSED = (
    (
        "flow_vs_regression/flow",
        "--model.mode regression",
        "--model.t_star 0.5 --model.mip_form paper --model.evaluation.solver rk4 --model.evaluation.nfe 16 "
        "--model.network.heads 7 --model.network.fourier_t 9",
    ),
    (
        "flow_vs_regression/flow",
        "--model.mode mip --model.network.kind transformer",
        "--model.network.residual true --model.evaluation.solver rk4 --model.evaluation.nfe 16",
    ),
    (
        "generative_policy/gaussian",
        "--model.parameters free",
        "--model.network.layers 4 --model.evaluation.nfe '[3]' --data.coupling OptimalTransport --data.num_workers 2",
    ),
    (
        "generative_policy/meanflow",
        "--model.loss_power 0 --model.optimizer adamw",
        "--model.loss_floor 0.5 --model.time.mean 1 --model.time.std 3 --model.muon_lr 0.5",
    ),
    ("generative_policy/flow", "", "--model.time.share 0.9 --model.network.heads 2"),
    (
        "generative_policy/bandit",
        "--model.policy gaussian",
        "--model.temperature 3 --model.inner_steps 1 --model.candidates 3 --model.time.share 0.1 --model.nfe 2 "
        "--model.target_std 0.5 --model.network.fourier_c 2 --model.network.fourier_t 2",
    ),
    ("generative_policy/bandit", "--model.critic known", "--data.reward_noise 3 --model.nfe 2"),
    ("generative_policy/meanflow", "--model.target_std 0", "--model.target_std_as sigma_min"),
    ("generative_policy/bandit", "--model.policy flow", "--model.entropy 3 --model.target_std 0.5 --model.time.std 3"),
    (
        "bilevel/regression",
        "--model.algorithm uniform",
        "--model.cg_iterations 3 --model.damping 1 --model.curvature hessian --model.unroll_steps 3 "
        "--model.adjoint network --model.ridge 3 --model.adjoint_steps 2 --model.outer_lr 3",
    ),
    ("bilevel/regression", "--model.algorithm funcbo", "--model.adjoint_steps 2 --model.adjoint_lr 1"),
    (
        "bilevel/control",
        "--model.agent mle",
        "--model.solver.inverse hessian --model.solver.cg_steps 2 --model.solver.vep_values 2 "
        "--model.solver.inner_value lagged --model.solver.state_gradient false --model.disturbance.drift_width 3",
    ),
    ("bilevel/control", "--model.agent omd", "--model.solver.cg_steps 2 --model.solver.cg_damping 1"),
)


def named(said: str) -> list[str]:
    return [line.split()[0] for line in said.splitlines() if "does nothing here: it wants" in line]


@pytest.mark.parametrize(("config", "settings", "unused"), UNUSED, ids=[f"{c} {s}" for c, s, _ in UNUSED])
def test_a_flag_that_does_nothing_is_told_of(
    config: str, settings: str, unused: str, runner: Runner, bitwise: Callable[..., None]
) -> None:
    """Each is named, and the run is bit for bit the one without it."""
    if config == "bilevel/control":
        pytest.importorskip("gymnasium")
    experiment, variant = config.split("/")
    here = Runner(runner.root, runner.capture, experiment, tiny(REPO / "configs" / f"{config}.yaml"))
    flags = (*shlex.split(settings), "--trainer.max_steps", "6", "--figures.enabled", "false")
    plain = here.ok("fit", variant, *flags)
    words = shlex.split(unused)
    said = here.ok("fit", variant, *flags, *words)
    assert [x for x in named(said) if x not in named(plain)] == words[::2]
    one, other = (here.checkpoint(variant, f"version_{k}") for k in (0, 1))
    bitwise(one["state_dict"], other["state_dict"])
    rows = [read_csv(here.folder(variant, f"version_{k}") / "metrics.csv") for k in (0, 1)]
    assert rows[0] == rows[1]
