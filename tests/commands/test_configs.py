"""list, show, copy, and configurations that are given by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_toys.cli import main
from lightning_toys.commands.shipped import find_config, shipped
from lightning_toys.errors import ToyError
from tests.conftest import REPO
from tests.shipped import CONFIGS


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _from_the_repository: None) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_configuration_is_shipped_and_says_what_it_answers() -> None:
    found = shipped()
    assert {s.path.resolve() for s in found} == {c.resolve() for c in CONFIGS}
    for s in found:
        assert s.answers, s.name
        assert s.takes.split()[1] in ("s", "min"), s.name


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for s in shipped():
        assert sum(line.startswith(f"{s.name} ") for line in said.splitlines()) == 1, s.name
    assert main(["list", "bilevel"]) == 0
    said = capsys.readouterr().out
    assert "bilevel/control" in said
    assert "flow_vs_regression" not in said


def test_show_and_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = find_config("flow_vs_regression/flow")
    assert main(["show", "flow_vs_regression/flow"]) == 0
    assert capsys.readouterr().out == Path(source).read_text()
    assert main(["copy", "flow_vs_regression/flow"]) == 0
    assert (tmp_path / "flow.yaml").read_text() == Path(source).read_text()
    assert main(["copy", "flow_vs_regression/flow", "mine"]) == 0
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["model"]["class_path"] == "FlowVsRegression"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show"], "show: 0 words given; give one EXPERIMENT/VARIANT"),
        (
            ["show", "flow"],
            "no configuration 'flow'; did you mean 'flow_vs_regression/flow' or 'generative_policy/flow'?",
        ),
        (["show", "bilevel/controll"], "did you mean 'bilevel/control'?"),
        (["show", "zzz"], "`lightning-toys list` shows the shipped ones"),
        (["list", "flows"], "'flows' is no experiment; give one of bilevel, "),
        (["list", "--long"], "list: --long: no such flag"),
        (["copy", "bilevel/control", "taken.yaml"], "copy: taken.yaml is there already; give another FILE"),
        (["copy", "bilevel/control", "no/folder.yaml"], "copy: no/folder.yaml cannot be written (No such file"),
        (["copy", "bilevel/control", "a", "b"], "copy: 3 words given; give EXPERIMENT/VARIANT [FILE]"),
        (
            ["fit", "-c", "flow_vs_regression/flwo"],
            "no file 'flow_vs_regression/flwo'; did you mean 'flow_vs_regression/flow'?",
        ),
        (["fit", "-c", "flow.yaml"], "did you mean 'flow_vs_regression/flow' or 'generative_policy/flow'?"),
        (["fit", "-c", "takn.yaml"], "no file 'takn.yaml'; did you mean 'taken.yaml'?"),
        (["fit", "-c"], "-c: a file name is missing"),
        (["sweep", "--grid.config", "[flow_vs_regression/flwo]"], "--grid.config: no file 'flow_vs_regression/flwo'"),
    ],
)
def test_what_is_not_there(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken.yaml").write_text("model: 3\n")
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert says in err
    assert (tmp_path / "taken.yaml").read_text() == "model: 3\n"


@pytest.mark.parametrize("verb", ["list", "show"])
def test_a_reader_that_stops_is_no_error(verb: str, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-c",
        "import time, lightning_toys.cli as c, sys; time.sleep(.3); sys.exit(c.main())",
        verb,
    ]
    words += ["flow_vs_regression/flow"] if verb == "show" else []
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_file_here_beats_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "flow_vs_regression").mkdir()
    here = tmp_path / "flow_vs_regression" / "flow.yaml"
    assert find_config("flow_vs_regression/flow") != "flow_vs_regression/flow.yaml"
    here.write_text("{}")
    assert find_config("flow_vs_regression/flow") == "flow_vs_regression/flow.yaml"
    assert find_config("configs/bilevel/control.yaml").endswith("configs/bilevel/control.yaml")
    with pytest.raises(ToyError, match="no file 'bilevel'"):
        find_config("bilevel")


def test_the_wheel_ships_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel, as its backend builds it, holds every configuration and the template, and absolute links."""
    import zipfile

    from hatchling.builders.wheel import WheelBuilder

    monkeypatch.chdir(REPO)
    (built,) = WheelBuilder(str(REPO)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        names = wheel.namelist()
        metadata = next(n for n in names if n.endswith("METADATA"))
        text = wheel.read(metadata).decode()
    for s in shipped():
        assert f"lightning_toys/configs/{s.name}.yaml" in names
    assert "lightning_toys/commands/template/test_mine.py.txt" in names
    assert "lightning_toys/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "configs/"))]
    assert 'src="docs' not in text
    assert "](docs" not in text
    assert "https://raw.githubusercontent.com/" in text
