"""What people try who know LightningCLI: it works, or one line says what to give instead."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import WandbLogger

from lightning_toys.cli import main, verb_first
from lightning_toys.commands.trainer.surroundings import keep_in_run_folder
from lightning_toys.training.progress_bar import Progress
from tests.conftest import Runner

TWO = ("--trainer.max_steps", "2")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--optimizer", "Adam"], "--optimizer: no such flag; an experiment has its own: give --model.lr"),
        (["--lr_scheduler", "StepLR"], "--lr_scheduler: no such flag; an experiment has its own rate: give --model.lr"),
        (["--lr", "0.1"], "--lr: no such flag; did you mean --model.lr?"),
        (["--hidden", "3"], "--hidden: no such flag; did you mean --model.hidden?"),
        (["--epochs", "3"], "--epochs: no such flag; give --trainer.max_epochs"),
        (["--seed", "3"], "--seed: no such flag; give --model.seeds '[0,1,2]'"),
        (["--gpus", "2"], "--gpus: no such flag; give --trainer.accelerator gpu --trainer.devices N"),
        (["--trainer.callbacks", "RichProgressBar"], "RichProgressBar is not allowed, it would count batches of many"),
        (["--trainer.callbacks", "TQDMProgressBar"], "--trainer.enable_progress_bar false hides it"),
        (["--trainer.callbacks", "Timr"], "--trainer.callbacks: no class 'Timr'; did you mean 'Timer'?"),
        (["--trainer.use_distributed_sampler", "true"], "each process takes its share of every batch by itself"),
    ],
)
def test_hints(flags: list[str], says: str, runner: Runner) -> None:
    code, err = runner.code("fit", "flow", *flags)
    assert code == 2
    assert err.count("\n") == 1, err
    assert says in err
    assert not runner.root.exists()


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--model.solver.no_warm", "give --model.solver.warm_start false"),
        ("--no_double", "give --model.double_q false"),
        ("--agent_type", "give --model.agent"),
        ("--env_name", "give --model.env"),
        ("--num_train_steps", "give --trainer.max_steps"),
    ],
)
def test_flags_of_the_original_of_control(flag: str, says: str, runner: Runner) -> None:
    code, err = runner.raw("fit", "-c", "bilevel/control", flag, "true")
    assert code == 2
    assert err.startswith(f"error: {flag}: no such ")
    assert err.rstrip().endswith(says)


def test_the_configuration_may_come_before_the_verb(runner: Runner) -> None:
    assert verb_first(["-c", "a", "--config=b", "fit", "-c", "c"]) == ["fit", "-c", "a", "--config=b", "-c", "c"]
    assert verb_first(["fit", "-c", "a"]) == ["fit", "-c", "a"]
    assert verb_first(["-c", "a"]) == ["-c", "a"]
    words = runner.words("fit", "flow", *TWO)
    code, err = runner.raw(*words[1:3], "fit", *words[3:])
    assert code == 0, err
    assert (runner.folder("flow") / "results.json").exists()
    code, err = runner.raw("-c", "flow_vs_regression/flow")
    assert code == 2
    assert "the verb comes first; give one of fit, " in err


@pytest.mark.parametrize("form", [["--trainer.callbacks+=Timer"], ["--trainer.callbacks+", "Timer"]])
def test_a_callback_with_an_enumeration(form: list[str], runner: Runner) -> None:
    """Timer's default is a member of an enumeration, which YAML does not know."""
    runner.ok("fit", "flow", *TWO, *form)
    kept = yaml.safe_load((runner.folder("flow") / "config.yaml").read_text())
    assert kept["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"
    runner.ok("test", "flow", "--ckpt_path", "last")  # and the test has nothing to say of it


@pytest.mark.parametrize(("given", "shown"), [((), True), (("true",), True), (("false",), False)])
def test_the_progress_bar_flag_is_ours(
    given: tuple[str, ...], shown: bool, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    true_init = Progress.__init__

    def init(self: Progress, *args: Any, **kwargs: Any) -> None:
        true_init(self, *args, **kwargs)
        made.append(self.shown)

    monkeypatch.setattr(Progress, "__init__", init)
    err = runner.ok("fit", "flow", *TWO, *[w for v in given for w in ("--trainer.enable_progress_bar", v)])
    assert made == [shown]
    assert "Epoch" not in err


def test_fast_dev_run_says_what_it_did(runner: Runner) -> None:
    err = runner.ok("fit", "flow", "--trainer.fast_dev_run", "true")
    assert err.strip() == "--trainer.fast_dev_run: 1 optimiser step and a validation went through; nothing was written"
    assert not runner.root.exists()


def test_environment_variables_are_said_to_be_ignored(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEPS", "7")
    monkeypatch.setenv("PL_OTHER", "7")
    err = runner.ok("fit", "flow", *TWO)
    assert err.splitlines()[0].startswith("PL_FIT__TRAINER__MAX_STEPS: not read; a setting is a flag")
    assert runner.checkpoint("flow")["global_step"] == 2


# a run's own config.yaml


def test_a_runs_own_config_means_that_run(runner: Runner, tmp_path: Path) -> None:
    for _ in range(2):
        runner.ok("fit", "flow", *TWO)
    first = runner.folder("flow")
    stored = yaml.safe_load((first / "config.yaml").read_text())["run"]
    assert stored == {"root": str(runner.root), "variant": "flow", "name": "version_0"}
    code, err = runner.raw("test", "-c", str(first / "config.yaml"))
    assert code == 0, err
    assert err.splitlines()[-1].endswith("flow_vs_regression/flow/version_0")
    assert len(list(first.glob("results*.json"))) == 2
    assert len(list(runner.folder("flow", "version_1").glob("results*.json"))) == 1
    moved = tmp_path / "elsewhere"
    runner.root.rename(moved)
    here = moved / "flow_vs_regression" / "flow" / "version_1"
    code, err = runner.raw("test", "-c", str(here / "config.yaml"))
    assert code == 0, err
    assert len(list(here.glob("results*.json"))) == 2
    assert not runner.root.exists()
    code, err = runner.raw("fit", "-c", str(here / "config.yaml"))
    assert code == 2
    assert "'version_1' is taken" in err
    assert "--ckpt_path auto" in err
    code, err = runner.raw("fit", "-c", str(here / "config.yaml"), "--run.name", "again")
    assert code == 0, err
    assert (here.parent / "again" / "results.json").exists()
    code, err = runner.raw("fit", "-c", str(here / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps", "4")
    assert code == 0, err
    assert len(list(here.glob("results*.json"))) == 3


# Weights & Biases and MLflow, which are not installed here


class Unfinished(WandbLogger):
    """A W&B logger as its constructor leaves it, without W&B."""

    def __init__(self, save_dir: str = ".", id: str | None = None) -> None:
        self._save_dir = save_dir
        self._id = id
        self._wandb_init: dict[str, Any] = {"dir": save_dir, "id": id, "resume": "allow"}


def test_wandb_writes_into_the_run_and_a_resume_goes_on_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, resumed, other = Unfinished(), Unfinished(), Unfinished()
    keep_in_run_folder(first, folder)
    keep_in_run_folder(resumed, folder)
    keep_in_run_folder(other, tmp_path / "another")
    assert first._wandb_init["dir"] == str(folder)
    assert len(first._wandb_init["id"]) == 16
    assert first._wandb_init["id"] == resumed._wandb_init["id"] == resumed._id
    assert first._wandb_init["id"] != other._wandb_init["id"]
    given = Unfinished("mine", "my-id")
    keep_in_run_folder(given, folder)
    assert (given._wandb_init["dir"], given._wandb_init["id"]) == ("mine", "my-id")


def test_mlflow_3_says_how(monkeypatch: pytest.MonkeyPatch, runner: Runner) -> None:
    import lightning.pytorch.loggers.mlflow as module

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("The filesystem tracking backend is in maintenance mode; migrate to 'sqlite:///mlflow.db'")

    monkeypatch.setattr(module.MLFlowLogger, "__init__", refuse)
    code, err = runner.code("fit", "flow", "--trainer.logger", "MLFlowLogger")
    assert code == 2
    assert "give --trainer.logger.tracking_uri sqlite:///mlflow.db too" in err


def test_wandb_without_a_key_is_one_line(monkeypatch: pytest.MonkeyPatch, runner: Runner) -> None:
    fake = types.ModuleType("wandb.errors")
    error = type("UsageError", (Exception,), {"__module__": "wandb.errors"})
    monkeypatch.setitem(sys.modules, "wandb.errors", fake)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error("No API key configured.")

    monkeypatch.setattr("lightning_toys.commands.trainer.settings.LightningCLI._run_subcommand", refuse)
    code, err = runner.code("fit", "flow", *TWO)
    assert code == 2
    assert err == "error: --trainer.logger: W&B says: No API key configured. (WANDB_MODE=offline keeps runs here)\n"


@pytest.mark.slow  # a sweep's output is read elsewhere too
def test_a_sweep_says_each_result_once(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    words = runner.words("sweep", "flow", *TWO, "--grid.model.mode", "[regression,flow]")
    assert main(words) == 0
    err = capsys.readouterr().err
    assert sum(line.startswith("l2 ") for line in err.splitlines()) == 2
    assert sum(line.startswith("run folder: ") for line in err.splitlines()) == 2
