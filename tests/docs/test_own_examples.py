"""The files of docs/examples/own, used from another folder as a reader would; and what of their settings is parsed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_toys.cli import main
from lightning_toys.flow_vs_regression import FlowVsRegression
from tests.conftest import REPO

CONFIG = ("-c", "flow_vs_regression/flow")
SHORT = (
    *("--model.seeds", "[0,1]", "--trainer.max_steps", "60", "--trainer.val_check_interval", "60"),
    *("--figures.enabled", "false", "--data.num_eval", "50"),
)
EXAMPLES: dict[str, tuple[str, ...]] = {
    "shipped": ("--model.network.hidden", "32"),
    "siren": ("--model.network", "my_network.Siren", "--model.network.hidden", "24", "--model.network.omega", "6"),
    "xpred": (
        *("--model.objective", "my_objective.XPrediction", "--model.objective.t_max", "0.9"),
        *("--model.network.hidden", "32"),
    ),
    "worst": ("--model.metrics", "my_metric.Worst", "--model.network.hidden", "32"),
}
FOLDER = Path("lightning_logs/flow_vs_regression/flow")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _from_the_repository: None) -> Path:
    for file in (REPO / "docs/examples/own").iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / name / "results.json").read_text())
    return found


def test_points_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each replica has its own draw, whatever the others; a line leaves what calculus says."""
    from my_data import Noisy  # type: ignore[import-not-found]

    data = Noisy(num_train=20_000, noise=0.3)
    both, alone = data.points([5, 6]), data.points([6])
    assert torch.equal(both.c[1], alone.c[0])
    assert not torch.equal(both.c[0], both.c[1])
    assert float((both.x1 - data.curve(both.c)).std()) == pytest.approx(0.3, rel=0.02)
    assert (
        main(["fit", *CONFIG, *SHORT, "--data", "my_data.Noisy", "--data.num_train", "2000", "--run.name", "noisy"])
        == 0
    ), capsys.readouterr().err
    found = results("noisy")["references"]["straight_line"]["l2"]
    assert found == pytest.approx((1 / 2 - 3 / math.pi**2) ** 0.5, rel=0.1)  # of sin(2 pi c) on [0, 1]


def test_networks_objectives_and_metrics_stand_in_one_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, flags in EXAMPLES.items():
        assert main(["fit", *CONFIG, *SHORT, *flags, "--run.name", name]) == 0, capsys.readouterr().err
    assert {n: results(n)["label"] for n in EXAMPLES} == {
        "shipped": "flow concat",
        "siren": "flow Siren",
        "xpred": "XPrediction concat",
        "worst": "flow concat",
    }
    # only what is shipped has steps written out
    assert {n for n in EXAMPLES if results(n)["backward"] == "autograd"} == {"siren", "xpred"}
    values = {n: results(n)["metrics"]["l2"]["values"] for n in EXAMPLES}
    assert values["worst"] == values["shipped"]
    assert values["siren"] != values["shipped"] != values["xpred"]
    assert all(w > v for w, v in zip(results("worst")["metrics"]["worst"]["values"], values["worst"], strict=True))
    assert "worst" in results("worst")["references"]["linear"]
    assert main(["compare", str(FOLDER)]) == 0, capsys.readouterr().err
    table = (FOLDER / "comparison/comparison.md").read_text()
    assert "Siren" in table
    assert "XPrediction" in table
    # a checkpoint is tested, its settings its own; in Python the class is given, and not imported
    words = ["test", *CONFIG, *SHORT, "--run.name", "xpred", "--ckpt_path", "last"]
    assert main([*words, *EXAMPLES["xpred"][:2]]) == 0, capsys.readouterr().err
    assert {k for k in results("xpred")["metrics"] if k.startswith("l2@zeros")} == {
        f"l2@zeros/ddim-{n}" for n in (1, 2, 4, 9)
    }
    from my_network import Siren  # type: ignore[import-not-found]

    path = FOLDER / "siren/checkpoints/last.ckpt"
    loaded = FlowVsRegression.load_from_checkpoint(path, weights_only=True, network=Siren(hidden=24, omega=6))
    assert loaded.predict([[0.5]]).shape == (2, 1, 1, 1)  # type: ignore[arg-type]


def test_a_target_and_a_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = ("--data.target", "my_target.Chirp", "--data.target.rate", "90")
    assert main(["fit", *CONFIG, *SHORT, *target, "--model.network.hidden", "8", "--run.name", "chirp"]) == 0
    assert "the target has frequencies up to 180.0, and 50 points resolve up to 153.9" in capsys.readouterr().err
    columns = ("--data.inputs", "[depth,slope,warmth,noise]", "--data.outputs", "[yield]")
    table = ("--data", "Table", "--data.path", "points.csv", *columns, *SHORT[:-2], "--model.network.hidden", "32")
    assert main(["fit", *CONFIG, *table, "--run.name", "table"]) == 0, capsys.readouterr().err
    references = results("table")["references"]
    assert references["gaussian_process"]["l2"] < 0.5 * references["mean"]["l2"]
    assert max(results("table")["metrics"]["l2"]["values"]) < references["mean"]["l2"]


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["fit", *CONFIG, *flags, "--print_config"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["network"]
    return found


def test_a_setting_that_both_have_keeps_to_the_class_chosen(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``hidden`` is an option of the shipped networks too, and must not choose one of them."""
    own = {"class_path": "my_network.Siren", "init_args": {"hidden": 9, "layers": 2, "omega": 10.0}}
    assert printed(capsys, "--model.network", "my_network.Siren", "--model.network.hidden", "9") == own
    assert printed(capsys, "--model.network.hidden", "9", "--model.network", "my_network.Siren") == own
    assert printed(capsys, "--model.network.hidden", "9")["kind"] == "concat"
    network = {"class_path": "my_network.Siren", "init_args": {"omega": 7.0}}
    content = {"model": {"class_path": "FlowVsRegression", "init_args": {"mode": "flow", "network": network}}}
    Path("mine.yaml").write_text(yaml.safe_dump(content))
    found = printed(capsys, "-c", "mine.yaml", "--model.network.hidden", "9")
    assert found == {"class_path": "my_network.Siren", "init_args": {"hidden": 9, "layers": 2, "omega": 7.0}}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model.network", "my_network.Siren", "--model.network.kind", "film"], "--model.network does not take it"),
        (
            ["--model.network", "my_network.Siren", "--model.network.omega", "x"],
            "omega: 'x' is not allowed; give a num",
        ),
        (["--model.network", "my_network.Sirn"], "'my_network' has no class 'Sirn'; did you mean 'Siren'?"),
        (["--model.objective", "my_network.Siren"], "give a class with Objective for its base"),
        (["--model.network.kind", "flim"], "'flim' is not allowed; give one of concat, film, transformer"),
    ],
)
def test_what_does_not_fit_is_one_line(
    flags: list[str], says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *CONFIG, *SHORT, *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert says in err
    assert not Path("lightning_logs").exists()
