"""new: what it writes trains, resumes, sweeps and compares at once, and its own tests pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_toys.cli import main
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.training.reporting import FigureWriter
from tests.conftest import REPO

SHORT = ("--trainer.max_epochs", "20", "--figures.enabled", "false")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _from_the_repository: None) -> Path:
    """A working folder that is on the path, as it is for `lightning-toys` and for `python cli.py`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_experiment_of_ones_own(
    folder: Path, capsys: pytest.CaptureFixture[str], bitwise: Callable[..., None]
) -> None:
    assert main(["new", "fresh_one"]) == 0
    assert capsys.readouterr().out.split() == ["fresh_one.py", "fresh_one.yaml", "test_fresh_one.py"]
    fit = ["fit", "-c", "fresh_one", *SHORT]
    assert main(fit) == 0, capsys.readouterr().err
    assert main([*fit, "--trainer.max_epochs", "12", "--run.name", "cut"]) == 0
    assert main([*fit, "--run.name", "cut", "--ckpt_path", "last"]) == 0
    runs = folder / "lightning_logs/fresh_one/fresh_one"
    a, b = (torch.load(runs / n / "checkpoints/last.ckpt", weights_only=True) for n in ("version_0", "cut"))
    assert a["global_step"] == 40
    for key in ("state_dict", "optimizer_states", "global_step"):
        bitwise(a[key], b[key], key)
    assert main(["test", "-c", "fresh_one", "--run.name", "cut", "--figures.enabled", "false"]) == 0
    assert main(["sweep", "-c", "fresh_one", "--grid.model.hidden", "[4,8]", *SHORT]) == 0
    said = capsys.readouterr()
    assert "hidden=4" in said.out
    assert main(["compare", str(runs / "version_0"), str(runs / "cut")]) == 0, capsys.readouterr().err


def test_its_own_tests_pass(folder: Path) -> None:
    assert main(["new", "own_tests"]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_own_tests.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{folder}:{REPO}"},
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_the_best_checkpoint_of_ones_own(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of the validation with the best mean of what the module says, small or large."""
    # the file is written anew, as long as before and within a second: its bytecode would be taken for up to date
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert main(["new", "own_best"]) == 0
    source = (folder / "own_best.py").read_text()
    given = ["fit", "-c", "own_best", "--trainer.max_steps", "60", "--trainer.val_check_interval", "10"]
    given += ["--figures.enabled", "false", "--model.lr", "0.2"]
    runs = folder / "lightning_logs/own_best/own_best"
    for mode in ("min", "max"):
        own = f'    best_metric = "eval/rmse"\n    best_mode = "{mode}"\n    headline ='
        (folder / "own_best.py").write_text(source.replace("    headline =", own, 1))
        sys.modules.pop("own_best", None)
        assert main([*given, "--run.name", mode]) == 0, capsys.readouterr().err
        rows = [r for r in read_csv(runs / mode / "metrics.csv") if r.get("eval/rmse")]
        score = {int(r["step"]): float(r["eval/rmse"]) for r in rows}
        assert len(score) == 6
        kept = torch.load(runs / mode / "checkpoints" / "best.ckpt", weights_only=True)
        assert kept["global_step"] == (min if mode == "min" else max)(score, key=score.__getitem__)
        assert main(["test", "-c", "own_best", "--run.name", mode, "--ckpt_path", "best"]) == 0
    (folder / "own_best.py").write_text(
        source.replace("    headline =", '    best_metric = "eval/rmes"\n    headline =', 1)
    )
    sys.modules.pop("own_best", None)
    capsys.readouterr()
    assert main([*given, "--run.name", "typo"]) == 2
    err = capsys.readouterr().err
    assert "error: OwnBest.best_metric: 'eval/rmes' is not measured; give one of eval/rmse, train/loss; did you" in err
    assert not (runs / "typo").exists()


FIGURES = """
    def figures(self, folder):
        if (folder / "results.json").exists():
            (folder / "came_after_results").touch()
        raise ValueError("no such\\ncolumn")
"""


def test_figures_that_fail_cost_no_results(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained and measured is written first; then one line says what failed and where, with exit code 1."""
    assert main(["new", "badly_drawn"]) == 0
    source = (folder / "badly_drawn.py").read_text()
    (folder / "badly_drawn.py").write_text(source + FIGURES)
    line = source.count("\n") + FIGURES[: FIGURES.index("raise")].count("\n") + 1
    said = f"figures of BadlyDrawn failed at badly_drawn.py, line {line} (ValueError: no such column)"
    short = ("--trainer.max_epochs", "20", "--figures.every_n_validations", "1")
    capsys.readouterr()
    assert main(["fit", "-c", "badly_drawn", *short]) == 1
    err = capsys.readouterr().err
    run = folder / "lightning_logs/badly_drawn/badly_drawn/version_0"
    where = run.relative_to(folder)
    wanted = f"error: {said}; all else that the run should write is in {where}"
    assert err.splitlines()[-1] == wanted
    assert "Traceback" not in err
    assert "rmse " in err
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert json.loads((run / "results.json").read_text())["stage"] == "fit"
    assert (run / "came_after_results").exists()
    assert main(["test", "-c", "badly_drawn", "--run.name", "version_0"]) == 1
    assert json.loads((run / "results.json").read_text())["stage"] == "test"
    assert capsys.readouterr().err.splitlines()[-1] == wanted
    # a sweep goes on to the cell's test and to the other cells, and is compared
    swept = ["sweep", "-c", "badly_drawn", "--grid.model.hidden", "[4,8]", *short]
    assert main(swept) == 1
    err = capsys.readouterr().err
    assert err.count(f"error: {said}") == 4
    assert err.splitlines()[-1] == (
        "error: figures of 2 of 2 cells could not be drawn: hidden=4, hidden=8; their numbers are whole "
        "(--sweep.retry true runs them again)"
    )
    assert (run.parent.parent / "badly_drawn-sweep/comparison/rmse.png").exists()
    # once they can be drawn, they are: nothing is trained anew
    assert main(swept) == 1
    (folder / "badly_drawn.py").write_text(source)
    sys.modules.pop("badly_drawn", None)
    capsys.readouterr()
    assert main([*swept, "--sweep.retry", "true"]) == 0
    assert capsys.readouterr().err.count("nothing was trained") == 2
    assert main(swept) == 0
    (folder / "badly_drawn.py").write_text(source + FIGURES)
    sys.modules.pop("badly_drawn", None)
    # a script gets the error itself
    monkeypatch.syspath_prepend(str(folder))
    found = __import__("badly_drawn")
    options = {"enable_progress_bar": False, "accelerator": "cpu", "max_steps": 2, "callbacks": [FigureWriter()]}
    trainer = Trainer(default_root_dir=folder / "script", logger=False, enable_checkpointing=False, **options)
    with pytest.raises(ValueError, match="no such"):
        trainer.fit(found.BadlyDrawn(), datamodule=found.BadlyDrawnData())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "0 words given; give one NAME"),
        (["a", "b"], "2 words given"),
        (["torch"], "'torch' is the name of an installed module"),
        (["test"], "'test' is the name of an installed module"),
        (["Mine"], "'Mine' is not allowed; give small letters"),
        (["class"], "'class' is not allowed, it is a keyword of Python"),
        (["bilevel"], "'bilevel' is a shipped experiment"),
        (["../x"], "'../x' is not allowed"),
        (["there"], "there.yaml is there already; give another NAME"),
    ],
)
def test_names_that_are_none(words: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "there.yaml").write_text("")
    assert main(["new", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: new: ")
    assert says in err
    assert err.count("\n") == 1
    assert [p.name for p in folder.iterdir()] == ["there.yaml"]
