"""docs/your-own.md, done as it says, from its first command to its last line of Python."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_toys.cli import main
from tests.conftest import REPO

PAGE = (REPO / "docs" / "your-own.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    first, own = blocks("sh")
    target, script, *_ = blocks("python")  # the others have tests of their own
    (tmp_path / "my_targets.py").write_text(target)
    commands = [shlex.split(line) for line in (first + own).splitlines()]
    assert [c[:2] for c in commands[:5]] == [["lightning-toys", v] for v in ("new", "fit", "test", "sweep", "compare")]
    for words in commands:
        assert main(words[1:]) == 0, capsys.readouterr().err
    for name in ("rmse.png", "comparison.md", "comparison.tex", "comparison.csv"):
        assert (tmp_path / "figure" / name).exists()
    assert (tmp_path / "lightning_logs/spring/spring/version_0/results.json").exists()
    assert (tmp_path / "test_spring.py").exists()
    capsys.readouterr()
    exec(
        compile(script.replace("logger=False)", "logger=False, enable_progress_bar=False)"), "your-own.md", "exec"), {}
    )
    said = capsys.readouterr().out
    assert "test/rmse" in said
    (line,) = re.findall(r"^\[[\d., ]+\]$", said, re.MULTILINE)
    values = [float(v) for v in line[1:-1].split(",")]
    assert len(values) == 4
    assert max(values) < 0.6


def test_the_contract_names_what_is_there() -> None:
    from lightning_toys.generative_policy.target import Target
    from lightning_toys.training.data import ToyDataModule
    from lightning_toys.training.module import ToyModule

    whole, _, of_targets = PAGE.partition("### What a target may know")
    named = re.findall(r"^\| `(\w+)\(", whole, re.MULTILINE)
    assert named == ["measure", "build", "replica_losses", "report"]
    optional = re.findall(r"^\| `(\w+)\(", of_targets, re.MULTILINE)
    assert set(optional) >= {"mode_shapes", "marginal_velocity", "mean_distance", "entropy", "marginal"}
    assert [name for name in optional if not hasattr(Target, name)] == []
    for name in (
        *named,
        "experiment",
        "label",
        "headline",
        "error_metrics",
        "metric_labels",
        "figures",
        "comparison_figures",
    ):
        assert hasattr(ToyModule, name), name
    assert hasattr(ToyModule, "unused_settings")
    assert hasattr(ToyDataModule, "train_columns")
