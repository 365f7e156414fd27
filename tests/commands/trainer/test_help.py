"""The help of fit, validate, test and predict, which is written out by hand, against the parser and the rules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lightning_toys.cli import TRAINER_VERBS, main
from lightning_toys.commands.trainer.help import GROUPS, class_names, trainer_help
from lightning_toys.commands.trainer.rules import RULES
from lightning_toys.commands.trainer.settings import SettingsCLI
from tests.conftest import Runner
from tests.shipped import CONFIGS

REFUSED = {f"--trainer.{flag}" for flag, _, _ in RULES} | {
    # refused by rules of their own, or by Lightning's nature: see test_rules.py
    *("--trainer.overfit_batches", "--trainer.limit_train_batches", "--seed_everything", "--weights_only"),
    *("--return_predictions", "--trainer.limit_test_batches", "--trainer.limit_predict_batches"),
}
WHOLE = {"--trainer", "--checkpoint", "--figures"}  # a section's own file: -c does that
APART = {"--verbose"}  # Lightning's table of means beside our line


def parser_flags(verb: str) -> set[str]:
    """Every flag that a verb's parser takes, without the help of nested classes and the forms that append."""

    class StopError(Exception):
        pass

    found: set[str] = set()

    class Parsers(SettingsCLI):
        def parse_arguments(self, parser: object, args: object) -> None:
            for action in self._subcommand_parsers[verb]._actions:
                found.update(s for s in action.option_strings if s.startswith("--"))
            raise StopError

    with pytest.raises(StopError):
        Parsers([verb, "-c", "flow_vs_regression/flow"])
    return {f for f in found if not f.endswith((".help", "+"))}


@pytest.mark.parametrize("verb", TRAINER_VERBS)
def test_every_flag_is_listed_and_none_that_is_refused(verb: str) -> None:
    listed = set(re.findall(r"^  (?:-c, )?(--[\w.]+)", trainer_help(verb), re.MULTILINE))
    taken = parser_flags(verb)
    assert len(taken) > 40
    assert REFUSED - {"--seed_everything", "--weights_only", "--return_predictions"} <= taken | {
        "--trainer.limit_test_batches"
    }
    for flags in GROUPS.values():
        for flag in flags:
            name = flag.name.removeprefix("-c, ")
            assert name in taken | {"--help", "--model.help"}, name
    assert not listed & REFUSED
    unlisted = taken - listed - REFUSED - WHOLE - APART
    everywhere = {f.name for flags in GROUPS.values() for f in flags if verb not in f.verbs}
    assert unlisted <= everywhere, unlisted - everywhere


@pytest.mark.parametrize(("flag", "values", "why"), RULES)
def test_what_the_help_leaves_out_is_refused(
    flag: str, values: tuple[object, ...], why: str, runner: Runner, tmp_path: Path
) -> None:
    other = {"gradient_clip_algorithm": "value", "default_root_dir": str(tmp_path), "gradient_clip_val": "1.0"}
    bools = {"enable_checkpointing": "false", "barebones": "true", "use_distributed_sampler": "true"}
    code, err = runner.code("fit", "flow", f"--trainer.{flag}", {**other, **bools}.get(flag, "3"))
    assert code == 2
    assert f"--trainer.{flag}: " in err
    assert why in err


def test_the_help_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "flow_vs_regression/flow", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--model.mode" in said
    assert "--data.num_train" in said
    assert "--trainer.max_steps" in said


@pytest.mark.parametrize("flag", ["--model.help", "--data.help"])
def test_help_without_a_class_names_the_classes(flag: str, runner: Runner) -> None:
    code, err = runner.raw("fit", flag)
    assert code == 2
    assert err.startswith(f"error: {flag}: a class is missing; give one of ")
    assert ("FlowVsRegression" if flag == "--model.help" else "InterpolationData") in err


def test_the_classes_are_those_of_the_configurations() -> None:
    for section in ("model", "data"):
        named = {yaml.safe_load(c.read_text())[section]["class_path"].rpartition(".")[2] for c in CONFIGS}
        assert set(class_names(section)) == named
    assert {"FlowVsRegression", "UpdateEntropy", "WindowRegression", "TiltedSampling"} <= set(class_names("model"))
    assert {"InterpolationData", "ReplayData"} <= set(class_names("data"))
