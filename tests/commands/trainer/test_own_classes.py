"""Classes of one's own: found, or one line says why not; beside the shipped ones in sweeps and comparisons."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from lightning_toys.cli import main
from lightning_toys.commands.trainer.own_classes import named_in, renewed, same_class, without_replaced
from tests.processes import fork

OWN = '''
import torch

from lightning_toys.flow_vs_regression import FlowVsRegression
from lightning_toys.flow_vs_regression.targets import Target
from lightning_toys.generative_policy.mixture import Mixture
from lightning_toys.training.results import Report


class Cosine(Target):
    dim = 1

    def __init__(self, k: float = 2.0) -> None:
        self.k = k

    @property
    def highest_frequency(self) -> float:
        return self.k

    def __call__(self, c):
        return torch.cos(self.k * c)


class TwoHills(Mixture):
    """Two modes, somebody's own."""

    def __init__(self, std: float = 0.1) -> None:
        super().__init__([[-1.0, 0.0], [1.0, 0.0]], std)


class MyFlow(FlowVsRegression):
    """A subclass: another label, else the same."""

    label = "my flow"


class Unlabelled(FlowVsRegression):
    """A subclass that says nothing of itself."""


class Faulty(Target):
    def __init__(self, k: int = 3) -> None:
        len(k)


class NotATarget:
    pass
'''
SMALL = (
    "--model.network.hidden",
    "8",
    "--figures.enabled",
    "false",
    "--trainer.max_steps",
    "2",
    "--data.num_eval",
    "50",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _from_the_repository: None) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_things.py").write_text(OWN)
    (tmp_path / "fresh_things.py").write_text("class Unseen:\n    pass\n")
    (tmp_path / "broken_thing.py").write_text("import torch\nx = (\n")
    (tmp_path / "failing_thing.py").write_text("import torch\n\n1 / 0\n")
    (tmp_path / "wanting_thing.py").write_text("import nowhere_at_all\n")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data.target", "own_thing.Cosine"], "no module 'own_thing'; did you mean 'own_things'?"),
        (["--data.target", "own_things.Cosin"], "'own_things' has no class 'Cosin'; did you mean 'Cosine'?"),
        (["--data.target", "broken_thing.X"], "broken_thing.py line 2: SyntaxError: '(' was never closed"),
        (["--data.target", "failing_thing.X"], "failing_thing.py line 3: ZeroDivisionError: division by zero"),
        (
            ["--data.target", "wanting_thing.X"],
            "wanting_thing.py line 1: ModuleNotFoundError: No module named 'nowhere_a",
        ),
        (["--data.target", "own_things.NotATarget"], "give a class with Target for its base"),
        (["--data.target", "own_things.Faulty"], "own_things.Faulty cannot be made: object of type 'int' has no len()"),
        (["--model", "own_things.Cosine"], "give a class with ToyModule for its base"),
        (["--model", "MyFlow"], "--model: no class 'MyFlow'; did you mean 'own_things.MyFlow'?"),
        (["--trainer.callbacks", "own_things.Stop"], "'own_things' has no class 'Stop'"),
    ],
)
def test_a_class_that_is_not_found_says_why(
    flags: list[str], says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", "flow_vs_regression/flow", *SMALL, *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith((f"error: {flags[0]}: ", f"error: {flags[1]} cannot be made"))
    assert says in err
    assert not (here / "lightning_logs").exists()


def test_a_file_that_names_it_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"model": {"class_path": "own_things.Nothing"}, "data": {"class_path": "InterpolationData"}}
    (here / "mine.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "-c", "mine"]) == 2
    err = capsys.readouterr().err
    assert "--model: 'own_things.Nothing' is not allowed: 'own_things' has no class 'Nothing' (in mine.yaml)" in err


TWINS = """
from lightning.pytorch import Callback

from lightning_toys.flow_vs_regression import targets


class Trigonometric(targets.Trigonometric):
    pass


class Nothing(Callback):
    pass
"""


def outcome(words: list[str], says: Path) -> tuple[int, str]:
    """Run a command in a child, whose imported classes are its own; return its exit code and what it said."""
    pid = fork(lambda: main(words), says)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, says.read_text()


def test_a_shipped_file_means_the_shipped_class(here: Path) -> None:
    """Short names of shipped files are those of the package, whatever classes are imported beside it."""
    (here / "twins.py").write_text(TWINS)
    words = ["fit", "-c", "flow_vs_regression/drawn_targets", *SMALL, "--model.seeds", "[0]"]
    code, said = outcome([*words, "--data.target", "twins.Trigonometric"], here / "said.txt")
    assert code == 0, said
    assert "the settings of Trigonometric in" in said  # which are another class's
    settings = json.loads(next(here.rglob("results.json")).read_text())["settings"]
    assert settings["data.target"] == "twins.Trigonometric"
    code, said = outcome([*words, "--trainer.callbacks", "twins.Nothing", "--run.name", "b"], here / "b.txt")
    assert code == 0, said
    settings = json.loads(next(here.rglob("b/results.json")).read_text())["settings"]
    assert settings["data.target"] == "lightning_toys.flow_vs_regression.Trigonometric"


def test_a_name_of_two_classes_is_said_where_it_stands(here: Path) -> None:
    (here / "twins.py").write_text(TWINS)
    target = {"target": {"class_path": "Trigonometric"}}
    content = {"model": {"class_path": "FlowVsRegression"}, "data": {"class_path": "InterpolationData"}}
    (here / "mine.yaml").write_text(yaml.safe_dump(content | {"data": {**content["data"], "init_args": target}}))
    (here / "later.yaml").write_text("data: {init_args: {target: {class_path: twins.Trigonometric}}}\n")
    code, said = outcome(["fit", "-c", "mine", "-c", "later", *SMALL], here / "said.txt")
    why = "it is 2 classes here; give lightning_toys.flow_vs_regression.Trigonometric or twins.Trigonometric"
    assert code == 2
    assert said == f"error: --data.target: 'Trigonometric' is not allowed, {why} (in mine.yaml)\n"


def test_own_classes_lie_beside_the_shipped_ones(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A subclass goes into its base's folder, and a sweep over both compares them under their labels."""
    words = ["-c", "flow_vs_regression/flow", *SMALL, "--model.seeds", "[0,1]"]
    grid = ["--grid.model", "[FlowVsRegression,own_things.MyFlow]"]
    assert main(["sweep", *words, *grid, "--model.network.kind", "film"]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    folder = here / "lightning_logs/flow_vs_regression/flow-sweep"
    runs = sorted(p.parent for p in folder.rglob("results.json"))
    assert len(runs) == 2
    assert "my flow" in said.out
    assert "flow film" in said.out
    labels = {json.loads((r / "results.json").read_text())["label"] for r in runs}
    assert labels == {"my flow", "flow film"}


def test_a_subclass_is_told_from_its_base(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-c", "flow_vs_regression/flow", *SMALL, "--model.seeds", "[0,1]"]
    assert main(["fit", *words]) == 0
    assert main(["fit", *words, "--model", "own_things.Unlabelled", "--model.mode", "flow"]) == 0
    assert main(["compare", "lightning_logs/flow_vs_regression/flow"]) == 0
    said = capsys.readouterr().out
    assert "Unlabelled: flow concat" in said
    assert "│ flow concat " in said


@pytest.mark.slow  # tests/docs/test_own_examples.py compares own classes in the gate
def test_runs_of_ones_own_target_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--model.network.hidden", "8", "--trainer.max_steps", "4", "--trainer.val_check_interval", "2")
    few = ("--model.evaluation.samples", "100", "--model.evaluation.pairs", "50", "--model.seeds", "[0,1]")
    words = ["fit", "-c", "generative_policy/meanflow", *small, *few, "--data.target", "own_things.TwoHills"]
    for lr in ("0.001", "0.002"):
        assert main([*words, "--model.lr", lr, "--figures.dpi", "20"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["compare", "lightning_logs/generative_policy/meanflow"]) == 0, capsys.readouterr().err
    out = here / "lightning_logs/generative_policy/meanflow/comparison"
    assert (out / "samples_side_by_side.png").exists()
    assert "lr=0.002" in (out / "comparison.md").read_text()
    # where the class is not here any more, the tables are
    for config in (here / "lightning_logs").rglob("config.yaml"):
        config.write_text(config.read_text().replace("own_things.TwoHills", "own_things.Gone"))
    assert main(["compare", "lightning_logs/generative_policy/meanflow", "--out", "again"]) == 0
    assert "no samples_side_by_side.png: 'own_things' has no class 'Gone'" in capsys.readouterr().err
    assert (here / "again" / "comparison.md").exists()


def test_another_class_does_not_inherit_the_files_settings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "-c", "generative_policy/meanflow", "--data.target", "TwoMoons", "--print_config"]
    assert main(words) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["init_args"]["target"]["init_args"] == {"std": 0.03}  # TwoMoons' own default
    words[-1:] = ["--model.network.hidden", "8", "--trainer.max_steps", "1", "--figures.enabled", "false"]
    few = ("--model.evaluation.samples", "100", "--model.evaluation.pairs", "50", "--model.seeds", "[0,1]")
    assert main([*words, *few]) == 0
    err = capsys.readouterr().err
    assert "--data.target TwoMoons: the settings of ThreeModes in " in err
    assert err.splitlines()[0].endswith("meanflow.yaml are dropped: std")


def test_replaced_settings() -> None:
    files = {
        "a": {
            "data": {"class_path": "D", "init_args": {"target": {"class_path": "p.A", "init_args": {"x": 1}}, "n": 2}}
        },
        "b": {"data": {"init_args": {"target": {"class_path": "q.B", "init_args": {"y": 3}}}}},
    }
    out, said = without_replaced(files, {})
    assert out["a"]["data"] == {"class_path": "D", "init_args": {"target": {"class_path": "p.A"}, "n": 2}}
    assert out["b"] == files["b"]
    assert said == ["b: data.target q.B: the settings of A in a are dropped: x"]
    out, said = without_replaced(files, {"--data.target": "B", "--data.target.y": "4"})  # the last file's class
    assert out["b"] == files["b"]
    assert len(said) == 1
    out, said = without_replaced(files, {"--data": "own.D2"})
    assert out["a"]["data"] == {"class_path": "D"}
    assert said[-1] == "--data own.D2: the settings of D in a are dropped: target, n"
    assert without_replaced(files, {"--run.name": "A.B"})[1] == [
        "b: data.target q.B: the settings of A in a are dropped: x"
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data.target", "own_things:Cosine"], "no class 'own_things:Cosine'; did you mean 'own_things.Cosine'?"),
        (["--data.target", "Unseen"], "no class 'Unseen'; did you mean 'fresh_things.Unseen'?"),
        (["--model.learning_rate", "0.1"], "--model.learning_rate: no such option; give --model.lr"),
        (["flow_vs_regression/mip"], "a configuration is given by its flag; did you mean -c flow_vs_regression/mip?"),
        (["-c", "own_things.py"], "own_things.py is Python; a configuration is YAML, such as own_things.yaml"),
    ],
)
def test_what_a_newcomer_types(words: list[str], says: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "flow_vs_regression/flow", *SMALL, *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert says in err


def test_a_file_in_another_folder_leads_there(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"model": {"class_path": "elsewhere_only.M"}, "data": {"class_path": "InterpolationData"}}
    (here / "mine.yaml").write_text(yaml.safe_dump(content))
    (here / "elsewhere_only.py").write_text("class M:\n    pass\n")
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p != str(here)])
    assert main(["fit", "-c", "../mine.yaml"]) == 2
    assert "elsewhere_only.py is not in the working folder: run in .." in capsys.readouterr().err


def test_small_pieces() -> None:
    assert same_class("a.B", "B")
    assert same_class("a.B", "a.B")
    assert not same_class("a.B", "c.B")
    assert not same_class("a.B", "C")
    tree = {"model": "own.M", "data": {"class_path": "D", "init_args": {"t": [{"class_path": "own.T"}]}}}
    assert list(named_in(tree)) == [(("model",), "own.M"), (("data", "t"), "own.T")]
    old = {"class_path": "lightning_toys.generative_policy.some_old_file.ThreeModes", "init_args": {"std": 1}}
    assert renewed([old])[0] == {"class_path": "lightning_toys.generative_policy.ThreeModes", "init_args": {"std": 1}}
    assert renewed({"class_path": "lightning_toys.cli.main"}) == {"class_path": "lightning_toys.cli.main"}
