"""Runs of 0.1.0, made by its code, are read: they go on, are tested, compared, and end with the weights of then.

weights-after-4-steps.json: sums of absolute values, after the code of 0.1.0 had gone on from the same checkpoints.
Only the moving averages' (ema_net) are of the code that warms them up: they go on from the averages of then.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lightning_toys.cli import main
from tests.conftest import REPO
from tests.shipped import FIRST, tiny

OLD = REPO / "tests" / "data" / "runs-0.1.0"
EXPECTED = json.loads((OLD / "weights-after-4-steps.json").read_text())
CONFIGS = {f"{c.parent.name}/{c.stem}": (kind, c) for kind, c in FIRST.items()}
YOUNGER = {"mirror_descent/mixture", "generative_policy/multigoal"}  # modules that 0.1.0 had not
RUNS = sorted(str(p.parent.parent.relative_to(OLD)) for p in OLD.glob("*/*/*/config.yaml"))


def test_there_is_a_run_of_every_module() -> None:
    assert set(RUNS) == set(CONFIGS) - YOUNGER
    assert set(EXPECTED) == {name for name, (kind, _) in CONFIGS.items() if kind.trains} - YOUNGER


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_0_1_0(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, config = CONFIGS[name]
    root = tmp_path / "logs"
    run = root / name / "made"
    shutil.copytree(OLD / name / "made", run)
    words = ["-c", str(config.relative_to(REPO)), "--run.root", str(root), "--run.name", "made", *tiny(config)]
    words += ["--figures.enabled", "false"]
    if kind.trains:
        more = [*words, "--ckpt_path", "last", "--trainer.max_steps", "4"]
        assert main(["fit", *more]) == 0, capsys.readouterr().err
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert EXPECTED[name]
        # what Muon steps was multiplied in bfloat16 then, which not every processor does now
        close = 1e-3 if "muon" in (run / "config.yaml").read_text() else 1e-5
        for key, wanted in EXPECTED[name].items():
            assert float(state[key].double().abs().sum()) == pytest.approx(wanted, rel=close, abs=1e-6), key
        words += ["--ckpt_path", "last"]
    else:
        words += ["--run.variant", "again"]  # a test that needs no checkpoint is a run of its own
    assert main(["test", *words]) == 0, capsys.readouterr().err
    copy = root / name / "other"
    shutil.copytree(OLD / name / "made", copy)
    assert main(["compare", str(copy), str(run), "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "comparison.md").exists()
