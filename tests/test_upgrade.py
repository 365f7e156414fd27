"""Coming from 0.1.0: its runs and sweeps are read, or refused by one line that says how to go on.

tests/upgrade has what tests/data/runs-0.1.0 has not, by the code of commit dc986f6ea034; each of the latter is gone on
with in tests/test_older_runs.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_toys.cli import main
from tests.conftest import REPO

RUNS = REPO / "tests" / "data" / "runs-0.1.0"
MORE = REPO / "tests" / "upgrade"
EXPERIMENTS = sorted(p.name for p in RUNS.iterdir() if p.is_dir())
QUIET = ("--figures.enabled", "false")
Capture = pytest.CaptureFixture[str]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def a_copy(source: Path, to: Path) -> Path:
    """A run, with its experiment's and its variant's folders."""
    run = to.joinpath(*source.parts[-3:])
    shutil.copytree(source, run)
    return run


def refused(words: list[str], run: Path, capsys: Capture) -> str:
    """The one line of a refusal, which changes nothing in the run."""
    capsys.readouterr()
    before = contents(run)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert contents(run) == before
    return line


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_runs_are_compared_on_one_page(experiment: str, tmp_path: Path, capsys: Capture) -> None:
    runs = sorted(p.parent for p in (RUNS / experiment).rglob("results.json"))
    assert runs
    for run in runs:
        out = tmp_path / run.parent.name
        assert main(["compare", str(run), "--out", str(out), "--html", str(out / "page.html")]) == 0, (
            capsys.readouterr().err
        )
        page = (out / "page.html").read_text()
        assert "<table" in page
        assert any(name in page for name in json.loads((run / "results.json").read_text())["metrics"])


def test_a_run_by_its_own_configuration(tmp_path: Path, capsys: Capture) -> None:
    """Each verb that an old run can be given, with its config.yaml and no other flag about the model."""
    run = a_copy(RUNS / "flow_vs_regression" / "demo" / "made", tmp_path / "logs")
    own = ["-c", str(run / "config.yaml"), *QUIET]
    for words in (
        ["predict", *own],
        ["validate", *own],
        ["fit", *own, "--ckpt_path", "auto", "--trainer.max_steps", "3"],
    ):
        assert main(words) == 0, capsys.readouterr().err
    with np.load(run / "predictions.npz") as found:
        assert found.files
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert json.loads((run / "results.json").read_text())["step"] == 3
    assert json.loads((run / "results-1.json").read_text())["step"] == 2


def test_a_checkpoint_in_a_script() -> None:
    from lightning_toys.flow_vs_regression import FlowVsRegression

    path = RUNS / "flow_vs_regression" / "demo" / "made" / "checkpoints" / "last.ckpt"
    module = FlowVsRegression.load_from_checkpoint(path, weights_only=True, map_location="cpu")
    with torch.no_grad():
        assert module(torch.linspace(0, 1, 5)[:, None]).shape == (8, 5, 1)


@pytest.mark.parametrize(
    ("name", "hint", "further", "readout"),
    [
        ("made", "give --model.mip_form path", ("--model.mip_form", "path"), "l2@zeros/two-step"),
        (
            "one",
            "give --model.mode mip --model.mip_form path",
            ("--model.mode", "mip", "--model.mip_form", "path"),
            "l2@zeros/one-step",
        ),
    ],
)
def test_mip_has_its_form_by_another_name(
    name: str, hint: str, further: tuple[str, ...], readout: str, tmp_path: Path, capsys: Capture
) -> None:
    """What was `published` is `path`, and mip_one_step was mip's first step: no number may change unseen."""
    run = a_copy(MORE / "flow_vs_regression" / "mip" / name, tmp_path / "logs")
    before = json.loads((run / "results.json").read_text())["metrics"]["l2"]["values"]
    own = ["-c", str(run / "config.yaml"), "--ckpt_path", "last", *QUIET]
    for verb in ("fit", "test", "predict", "validate"):
        length = ["--trainer.max_steps", "3"] if verb == "fit" else []
        assert refused([verb, *own, *length], run, capsys).endswith(hint)
    assert main(["test", *own, *further]) == 0, capsys.readouterr().err
    after = json.loads((run / "results.json").read_text())["metrics"]
    assert after[readout]["values"] == pytest.approx(before, rel=1e-5)


def test_a_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """By the same line and the same file: what is done stays, what was cut off is ended; another file is refused."""
    monkeypatch.chdir(tmp_path)
    sweep = Path("logs") / "flow_vs_regression" / "demo-sweep"
    shutil.copytree(MORE / "flow_vs_regression" / "demo-sweep", sweep)
    (sweep / ".claims" / "mode=flow").mkdir(parents=True)  # who ran a cell, which nothing reads any more
    (sweep / ".claims" / "mode=flow" / "0").write_text("{}")
    flow, regression = sweep / "mode=flow", sweep / "mode=regression"
    mark = json.loads((flow / "sweep.json").read_text())
    Path("demo.yaml").write_text(mark["flags"][0])
    (flow / "sweep.json").write_text(json.dumps({**mark, "done": False}))
    (flow / "results.json").unlink()
    rest = mark["flags"][1 : mark["flags"].index("--run.variant")]
    words = ["sweep", "-c", "demo.yaml", "--grid.model.mode", "[regression,flow]", *rest]
    before = contents(regression)
    assert main(words) == 0, capsys.readouterr().err
    assert contents(regression).items() >= before.items()
    assert json.loads((flow / "sweep.json").read_text())["done"]
    assert "l2" in json.loads((flow / "results.json").read_text())["metrics"]
    assert (sweep / "comparison" / "comparison.html").exists()
    Path("demo.yaml").write_text(mark["flags"][0] + "# a word more\n")
    assert refused(words, sweep, capsys).endswith("was swept with other settings; give another --run.variant")
