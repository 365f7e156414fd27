"""Configurations whose YAML is sound and whose content is not: types, keys, classes, sizes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.malformed import CORPUS, Refusal, at

HUGE = 10**18
ARGS = "model.init_args"

# where, what, and what the line has to name
VALUES: list[tuple[str, Any, str]] = [
    # a list, a word or a number in the place of a mapping, and the other way round
    ("model", [1, 2], "model"),
    ("model", 3, "model"),
    ("model", "Flwo", "Flwo"),
    ("model", None, "experiment"),
    ("model", {}, "model"),
    ("data", [1], "data"),
    ("data", 3, "data"),
    ("data", {}, "data"),
    ("trainer", [1], "trainer"),
    ("trainer", 3, "trainer"),
    ("trainer", "fast", "trainer"),
    ("run", 3, "run"),
    ("run", ["a"], "run"),
    ("checkpoint", [1], "checkpoint"),
    ("figures", "off", "figures"),
    (ARGS, [1], "init_args"),
    (ARGS, 3, "init_args"),
    (ARGS, "flow", "init_args"),
    ("data.init_args", [1], "init_args"),
    (f"{ARGS}.network", [1], "network"),
    (f"{ARGS}.network", 3, "network"),
    (f"{ARGS}.evaluation", "euler", "evaluation"),
    (f"{ARGS}.lr", [0.1], "lr"),
    (f"{ARGS}.lr", {"a": 1}, "lr"),
    (f"{ARGS}.lr", "fast", "lr"),
    (f"{ARGS}.lr", None, "lr"),
    (f"{ARGS}.mode", 3, "mode"),
    (f"{ARGS}.mode", None, "mode"),
    (f"{ARGS}.mode", ["flow"], "mode"),
    (f"{ARGS}.seeds", {"a": 1}, "seeds"),
    (f"{ARGS}.seeds", "01", "seeds"),
    (f"{ARGS}.seeds", [[0]], "seeds"),
    (f"{ARGS}.seeds", [0.5], "seeds"),
    (f"{ARGS}.seeds", [None], "seeds"),
    (f"{ARGS}.seeds", None, "seeds"),
    (f"{ARGS}.network.hidden", "wide", "hidden"),
    (f"{ARGS}.network.hidden", 8.5, "hidden"),
    (f"{ARGS}.network.hidden", [8], "hidden"),
    ("data.init_args.num_train", "many", "num_train"),
    ("data.init_args.target", 3, "target"),
    ("data.init_args.target", ["Projected"], "target"),
    ("trainer.max_steps", "many", "max_steps"),
    ("trainer.max_steps", 1.5, "max_steps"),
    ("trainer.max_steps", [2], "max_steps"),
    ("trainer.callbacks", 3, "callbacks"),
    ("trainer.callbacks", ["nonsense"], "callbacks"),
    ("trainer.logger", 3, "logger"),
    ("run.root", [1], "root"),
    ("run.name", {"a": 1}, "name"),
    ("figures.enabled", "perhaps", "enabled"),
    ("ckpt_path", [1], "ckpt_path"),
    ("ckpt_path", "nowhere.ckpt", "--ckpt_path"),
    ("ckpt_path", "last", "--ckpt_path"),
    # sizes
    (f"{ARGS}.network.hidden", -8, "--model.network.hidden"),
    (f"{ARGS}.network.hidden", 0, "--model.network.hidden"),
    (f"{ARGS}.network.layers", -1, "--model.network.layers"),
    (f"{ARGS}.lr", -1.0, "--model.lr"),
    (f"{ARGS}.lr", 0, "--model.lr"),
    (f"{ARGS}.lr", float("nan"), "--model.lr"),
    (f"{ARGS}.lr", float("inf"), "--model.lr"),
    (f"{ARGS}.weight_decay", float("nan"), "--model.weight_decay"),
    (f"{ARGS}.weight_decay", float("inf"), "--model.weight_decay"),
    (f"{ARGS}.weight_decay", -0.1, "--model.weight_decay"),
    (f"{ARGS}.clip_grad_norm", float("nan"), "--model.clip_grad_norm"),
    (f"{ARGS}.clip_grad_norm", 0, "--model.clip_grad_norm"),
    (f"{ARGS}.ema_decay", float("nan"), "--model.ema_decay"),
    (f"{ARGS}.ema_decay", 1, "--model.ema_decay"),
    (f"{ARGS}.seeds", [-1], "--model.seeds"),
    (f"{ARGS}.seeds", [2**64], "--model.seeds"),
    (f"{ARGS}.evaluation.draws", 0, "--model.evaluation.draws"),
    (f"{ARGS}.evaluation.nfe", -3, "--model.evaluation.nfe"),
    ("data.init_args.num_train", -20, "--data.num_train"),
    ("data.init_args.num_eval", -1, "--data.num_eval"),
    ("data.init_args.num_eval", 0, "--data.num_eval"),
    ("data.init_args.batch_size", -1, "--data.batch_size"),
    ("data.init_args.holdout", float("nan"), "--data.holdout"),
    ("data.init_args.holdout", 1.5, "--data.holdout"),
    ("data.init_args.seed", -1, "--data.seed"),
    ("trainer.max_steps", -5, "--trainer"),
    ("trainer.max_epochs", -5, "--trainer"),
    ("trainer.log_every_n_steps", -1, "log_every_n_steps"),
    ("trainer.val_check_interval", 0, "--trainer.val_check_interval"),
    ("trainer.devices", -3, "devices"),
    ("trainer.devices", 0, "devices"),
    ("trainer.num_nodes", 0, "num_nodes"),
    ("trainer.precision", "3-bit", "precision"),
    ("trainer.accelerator", "abacus", "accelerator"),
    ("trainer.strategy", "chaos", "strategy"),
    ("checkpoint.every_n_steps", -1, "--checkpoint.every_n_steps"),
    ("figures.every_n_validations", -1, "--figures.every_n_validations"),
    ("trainer", None, "trainer"),
    ("run", None, "run"),
    ("figures", None, "figures"),
    ("figures.dpi", 0, "--figures.dpi"),
    ("figures.dpi", -5, "--figures.dpi"),
    ("run.root", "", "--run.root"),
    ("run.root", "a\0b", "--run.root"),
    ("run.name", "a\0b", "--run.name"),
    ("run.name", "../../up", "--run.name"),
    ("run.name", "x" * 300, "--run.name"),
    ("run.variant", "..", "--run.variant"),
]
MEMORY: list[tuple[str, Any, str]] = [
    (f"{ARGS}.network.hidden", HUGE, "--model.network.hidden"),
    (f"{ARGS}.network.layers", HUGE, "--model.network.layers"),
    ("data.init_args.num_train", HUGE, "--data.num_train"),
    ("data.init_args.batch_size", HUGE, "--data.batch_size"),
    ("data.init_args.target", {"class_path": "Trigonometric", "init_args": {"dim": HUGE}}, "--data.target.dim"),
    ("data.init_args.target", {"class_path": "Trigonometric", "init_args": {"components": HUGE}}, "components"),
]
UNKNOWN = [
    ("modle", {"class_path": "FlowVsRegression"}, "model"),
    ("trainr", {}, "trainer"),
    ("model.clas_path", "FlowVsRegression", ""),
    ("model.init_arg", {}, ""),
    (f"{ARGS}.moed", "flow", "mode"),
    (f"{ARGS}.network.hiden", 8, "hidden"),
    (f"{ARGS}.evaluation.drows", 2, "draws"),
    ("data.init_args.num_trian", 20, "num_train"),
    ("data.init_args.target", {"class_path": "Trigonometric", "init_args": {"componets": 3}}, "componets"),
    ("trainer.max_stepz", 2, "max_steps"),
    ("trainer.precisoin", "32-true", "precision"),
    ("run.nmae", "a", "name"),
    ("checkpoint.every", 3, ""),
    ("figures.dpj", 3, "dpi"),
    ("ckpt_paht", "last", "ckpt_path"),
]
NO_CLASS = [
    "os.system", "os.popen", "subprocess.Popen", "subprocess.run", "builtins.eval", "builtins.exec", "builtins.open",
    "pathlib.Path", "runpy.run_path", "lightning_toys", "lightning_toys.cli.main", "lightning_toys.nowhere.Class",
    "torch.nn.Linear", "torch.load", "json", "nowhere.Class", "", ".", "..", "a b", "os.system.", ".os.system",
    "lightning.pytorch.LightningModule", "lightning.pytorch.LightningDataModule", "lightning.pytorch.Trainer",
    "lightning.pytorch.demos.boring_classes.BoringModel", "lightning_toys.generative_policy.policy.GenerativePolicy",
    3, None, ["a"], True,
]  # fmt: skip
PLACES = ("model", "data", "data.init_args.target", "trainer.callbacks", "trainer.logger", "trainer.profiler")
CALLED = ("os.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "os.popen", "pathlib.Path")


def ident(x: Any) -> str:
    return repr(x)[:24].replace("::", ":")


@pytest.mark.parametrize(("where", "value", "named"), VALUES, ids=ident)
def test_a_value_of_another_kind(where: str, value: Any, named: str, refuse: Refusal) -> None:
    refuse.fit(refuse.file(at(where, value)), named)


@pytest.mark.parametrize(("where", "value", "named"), MEMORY, ids=ident)
def test_more_than_memory_holds(where: str, value: Any, named: str, refuse: Refusal) -> None:
    refuse.fit(refuse.file(at(where, value)), named)


@pytest.mark.parametrize(("where", "value", "meant"), UNKNOWN, ids=ident)
def test_a_typo_names_its_file(where: str, value: Any, meant: str, refuse: Refusal) -> None:
    name = "componets" if "target" in where else where.rpartition(".")[2]
    refuse.fit(refuse.file(at(where, value)), name, "wrong.yaml", meant)


@pytest.mark.parametrize("path", NO_CLASS, ids=ident)
def test_a_model_that_is_no_experiment(path: Any, refuse: Refusal) -> None:
    refuse.fit(refuse.file(at("model", {"class_path": path})), "model", flags=("--run.name", "x"))


def test_the_base_of_all_experiments_is_none(refuse: Refusal) -> None:
    base = {"class_path": "lightning_toys.training.module.ToyModule", "init_args": {"seeds": [0]}}
    refuse.fit(refuse.file(at("model", base)), "--model", "ToyModule is not an experiment")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("path", CALLED)
def test_a_function_is_not_called(path: str, place: str, refuse: Refusal) -> None:
    command = f"touch {refuse.canary}"
    words = f"open({str(refuse.canary)!r}, 'w')" if path.startswith("builtins") else command
    names = {"os.system": "command", "os.popen": "cmd", "subprocess.Popen": "args"}
    init = {names.get(path, "source"): words} | ({"shell": True} if path == "subprocess.Popen" else {})
    spec: Any = {"class_path": path, "init_args": init}
    refuse.fit(refuse.file(at(place, [spec] if place == "trainer.callbacks" else spec)))


def test_a_configuration_of_another_experiment(refuse: Refusal) -> None:
    refuse.fit(refuse.file(at("data.class_path", "MixtureData")), "wrong.yaml")
    refuse.fit(refuse.file(at("model.class_path", "GaussianPolicy")), "wrong.yaml")
    refuse.fit(refuse.file(at("model.class_path", "MeanFlowPolicy")), "wrong.yaml")


FLAGS = [
    ("--model.seeds", "[" * 5000 + "]" * 5000),
    ("--model.seeds", "&a [*a]"),
    ("--model.seeds", "!!python/object/apply:os.system ['touch canary']"),
    ("--model", "!!python/object/apply:os.system ['touch canary']"),
    ("--model", "{class_path: os.system, init_args: {command: touch canary}}"),
    ("--trainer.callbacks", "[{class_path: os.system, init_args: {command: touch canary}}]"),
    ("--trainer.callbacks+", "{class_path: os.system, init_args: {command: touch canary}}"),
    ("--trainer.max_steps", "9" * 5000),
    ("--model.lr", "9" * 5000),
    ("--trainer", "/etc/passwd"),
    ("--model", "/etc/passwd"),
    ("--model.network", "wrong.yaml"),
    ("--run.name", ""),
    ("--weights_only", "false"),
    ("--model.lr", ""),
    ("--model.seeds", ""),
    ("--", ""),
    ("-x", "3"),
    ("--=", "3"),
    ("--.", "3"),
    ("--model..lr", "3"),
    ("--model.", "3"),
    ("--model.seeds.0", "3"),
    ("--data.target.init_args.dim", "x"),
    ("stray", "word"),
]


@pytest.mark.parametrize(("flag", "value"), FLAGS, ids=ident)
def test_a_flag_that_is_none(flag: str, value: str, refuse: Refusal) -> None:
    refuse.fit(refuse.file(at("trainer.max_steps", 2)), flags=(flag, value))


@CORPUS
@given(
    st.sampled_from(sorted({w for w, _, _ in VALUES})),
    st.text(max_size=6) | st.binary(max_size=6) | st.lists(st.text(max_size=3), min_size=1, max_size=2),
)
def test_any_value_anywhere(refuse: Refusal, where: str, value: Any) -> None:
    """What is allowed after all stops at an accelerator that nobody has."""
    refuse.fit(refuse.file(at(where, value)), flags=("--trainer.accelerator", "abacus"))
