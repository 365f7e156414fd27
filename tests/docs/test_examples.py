"""The scripts of docs/examples and the notebooks of docs/notebooks: run as a reader would; what they say is read."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch

from gallery.notebooks import FOLDER, execute, tidy
from lightning_toys.commands.experiments import EXPERIMENTS
from lightning_toys.flow_vs_regression import Trigonometric
from lightning_toys.mirror_descent import LinearGaussian
from tests.conftest import REPO

SCRIPTS = REPO / "docs" / "examples"
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
# what Lightning itself says on standard error; everything else is ours, and has to be named here
LIGHTNINGS = re.compile(
    r"(GPU|TPU) available: .*|💡 Tip: .*|.*isinstance\(treespec, LeafSpec\).*|`Trainer.fit` stopped: .*"
    r"|\S*setup\.py:\d+: GPU available but not used\..*"
)
CALLBACK = re.compile(
    r"UpdateEntropyCallback: (\d+ measurements of [\d.]+ s, \d+% of the training's \d+ s"
    r"|\d+ of \d+ measured changes are within the second-order prediction's 95 % interval \(both errors\))"
)
OFF_TARGET = re.compile(
    r"warning: schedule LateRamp does not end at the target .*"
)  # of mirror_descent's script, on purpose
JUPYTERS = re.compile(r".*TqdmWarning: IProgress not found.*|  from \.autonotebook import tqdm as notebook_tqdm")


def unexpected(stderr: str) -> list[str]:
    known = (LIGHTNINGS, CALLBACK, JUPYTERS, OFF_TARGET)
    return [line for line in stderr.splitlines() if line and not any(p.fullmatch(line) for p in known)]


def test_warnings_of_ours_would_be_seen() -> None:
    assert unexpected("GPU available: False, used: False\nnothing will be learned: 3 steps\n") == [
        "nothing will be learned: 3 steps"
    ]


class Said:
    """What a script printed."""

    def __init__(self, text: str) -> None:
        self.text = text

    def numbers(self, pattern: str) -> list[list[float]]:
        """The numbers in place of each # of the whole lines that fit a pattern; there is at least one such line."""
        line = re.compile(re.escape(pattern).replace(r"\#", f"({NUMBER})").replace("\\ ", " "), re.MULTILINE)
        found = [m for m in map(line.fullmatch, self.text.splitlines()) if m]
        assert found, f"no line like {pattern!r} in\n{self.text}"
        out = [[float(x) for x in m.groups()] for m in found]
        assert all(math.isfinite(x) for row in out for x in row)
        return out

    def one(self, pattern: str) -> list[float]:
        (row,) = self.numbers(pattern)
        return row


def flow_vs_regression(said: Said) -> None:
    rmse = {m: said.one(f"{m}: RMSE # ± # (half of the 95 % interval over # seeds)") for m in ("regression", "flow")}
    assert 0 < rmse["regression"][0] < 0.06
    assert 0.04 < rmse["flow"][0] < 0.4
    for mode, (mean, half, seeds) in rmse.items():
        assert (half > 0, seeds) == (True, 4)
        assert said.one(f"{mode}: the test's mean RMSE is #") == [mean]  # the same readout, the same grid
    steps = {int(n): mean for mean, _, n in said.numbers("flow: RMSE # ± # with # Euler steps")}
    assert list(steps) == [1, 4, 9]
    assert steps[1] == rmse["flow"][0]
    assert steps[9] < steps[1]
    assert said.one("straight lines between the points: RMSE #")[0] == pytest.approx(0.004, abs=6e-4)
    truth, *predicted = said.one("f(0.25) = #; predicted by the seeds: # # # #")
    assert truth == pytest.approx(Trigonometric(components=2)(torch.tensor([[0.25]])).item(), abs=0.006)
    assert max(abs(p - truth) for p in predicted) < 0.5
    assert len(set(predicted)) > 1


def generative_policy(said: Said) -> None:
    tv, _, seeds = said.one("gaussian: total variation of the mode weights # ± # over # seeds")
    assert 0.6 < tv < 0.73  # one mode each: 1 - w for w of .39, .33 or .28
    assert seeds == 3
    assert said.one("meanflow: total variation of the mode weights # ± # over # seeds")[0] < 0.1
    (gaussian,), (meanflow,) = (
        said.one(f"{name}: #% of the actions are more than 3 sd from every mode") for name in ("gaussian", "meanflow")
    )
    assert 0 <= gaussian <= 4
    assert 2 <= meanflow <= 35
    shares = said.one("meanflow, seed 0: shares of the modes # # #")
    assert sum(shares) == pytest.approx(1, abs=0.016)
    assert max(abs(s - w) for s, w in zip(shares, (14 / 36, 12 / 36, 10 / 36), strict=True)) < 0.12
    regret, half, uniform = said.one("bandit: regret # ± #; uniform actions have #")
    assert uniform == pytest.approx(0.91, abs=0.01)
    assert 0 <= regret < 0.85
    assert half > 0
    actions = said.one("bandit, seed 0: actions at 0 and 90 degrees (#, #) (#, #)")
    assert max(map(abs, actions)) < 1.5


def mirror_descent(said: Said) -> None:
    kl = {n: said.one(f"{n}: KL to the target # ± # nats for # evaluations per sample") for n in
          ("importance", "mala", "pc_ula", "pc_mala")}  # fmt: skip
    assert kl["importance"][0] < 0.02
    assert kl["mala"][0] < 0.005
    assert kl["pc_ula"][0] == pytest.approx(0.0999, abs=0.015)  # its exact distribution's
    assert kl["pc_mala"][0] < 0.01
    assert [row[2] for row in kl.values()] == [3, 104, 242, 82]
    exact, importance = said.one("as many exact draws: # nats; importance has #")
    assert 0 < exact < 0.01
    assert importance == pytest.approx(kl["importance"][0], abs=1e-4)
    assert said.one("1000 samples of each seed by mala: the mean action is # ± #")[0] == pytest.approx(0.9375, abs=0.05)
    assert 0 < said.one("learned: relative error of the score # ± #")[0] < 0.4
    for of in ("learned", "exact"):
        assert said.one(f"mala with the {of} energy: KL to the target # ± # nats")[0] < 0.04
    level = LinearGaussian().joint.level(0.5)
    score = said.one("learned score at (1, 1), seed 0: # #")
    np.testing.assert_allclose(score, (level.m - np.ones(2)) @ level.precision, atol=0.15)


def update_entropy(said: Said) -> None:
    reward, _, entropy, _ = said.one("reward # ± #, entropy # ± # nats per token")
    assert 0 <= reward <= 1
    assert 0.05 < entropy < 1.5
    rows = said.numbers(
        "seed #: dH/d eta # ± # (standard error); predicted for a step of .01 #, measured # ± # nats per token"
    )
    assert [row[0] for row in rows] == [0, 1, 2]
    for _, slope, error, predicted, measured, measured_error in rows:
        assert predicted == pytest.approx(0.01 * slope, abs=1.1e-5)
        assert error > 0
        assert 0 < measured_error < 0.05
        assert abs(predicted - measured) < 0.1
    slope, momentum = said.one("mean dH/d eta #, of which momentum #")
    assert slope == pytest.approx(np.mean([row[1] for row in rows]), abs=2e-3)
    assert momentum != 0
    answers = re.findall(r"^seed (\d): 7\+5= ([0-9+=,;]*) 2\+2= ([0-9+=,;]*)$", said.text, re.MULTILINE)
    assert [a[0] for a in answers] == ["0", "1", "2"]
    # imitated: the form of a worked solution in most of the answers
    assert sum(bool(re.fullmatch(r"\d\+\d=\d\d;\d\d", text)) for a in answers for text in a[1:]) >= 3


def bilevel(said: Said) -> None:
    found, uniform = (said.one(f"{a}: loss over the last sixth of the stream # ± #") for a in ("funcbo", "uniform"))
    (best,) = said.one("the best fixed weights would have #")
    assert best == pytest.approx(1.25, abs=0.006)
    assert best < found[0] < 14 < uniform[0] < 25
    lags = said.one("funcbo: the largest weight is that of lag #, # and # in the three seeds")
    assert all(18 <= lag <= 22 for lag in lags)  # the period is 20
    assert max(map(abs, said.one("funcbo, seed 0: the prediction at x = 0 is # # #"))) < 100
    returns, half, random = said.one("control: return # ± # in 10 episodes of each seed; random actions have #")
    assert 15 < random < 30
    assert random < returns <= 500
    assert half > 0
    # a step has the reward 1
    assert said.one("control: the mean episode has # steps")[0] == pytest.approx(returns, abs=0.6)
    action, angle = said.one("control, seed 0: action #, predicted angle # rad")
    assert action in (0, 1)
    assert abs(angle) < 0.2


CHECKS: dict[str, Callable[[Said], None]] = {
    check.__name__: check for check in (flow_vs_regression, generative_policy, mirror_descent, update_entropy, bilevel)
}


def test_each_experiment_has_a_script_and_a_notebook() -> None:
    assert set(CHECKS) == set(EXPERIMENTS)
    assert {p.stem for p in SCRIPTS.glob("*.py")} == {*EXPERIMENTS, "pendulum"}
    assert {p.stem for p in FOLDER.glob("*.ipynb")} == set(EXPERIMENTS)


# most of all scripts' time; the other is run in the gate
SLOW_SCRIPTS = ("bilevel", "flow_vs_regression", "generative_policy", "update_entropy")
ALL_SCRIPTS = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW_SCRIPTS else []) for n in CHECKS]


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_scripts(name: str, tmp_path: Path) -> None:
    given = [] if name == "flow_vs_regression" else ["runs"]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{name}.py"), *given],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert unexpected(done.stderr) == []
    CHECKS[name](Said(done.stdout))
    (folder,) = tmp_path.iterdir()  # nothing lies beside it
    assert folder.name == (given or ["lightning_logs"])[0]
    assert list(folder.rglob("*.ckpt"))


def test_a_number_that_is_none_is_seen() -> None:
    said = Said("flow: RMSE nan ± 0.1\nregression: RMSE 0.1 ± 0.01\n")
    assert said.one("regression: RMSE # ± #") == [0.1, 0.01]
    with pytest.raises(AssertionError, match="no line like"):
        said.one("flow: RMSE # ± #")


def shown(cell: Any) -> list[dict[str, str]]:
    """What a cell shows, by kind; numbers and 'what is quoted' may differ from machine to machine, and are #."""
    out = []
    for output in cell.get("outputs", []):
        if output.get("name") == "stderr":
            continue
        data = {"text": output["text"]} if "text" in output else dict(output["data"])
        out.append(
            {k: "" if k.startswith("image/") else re.sub(rf"{NUMBER}|'[^'\n]*'", "#", v) for k, v in data.items()}
        )
    return out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_notebooks_are_tidy(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert path.stat().st_size < 150_000
    assert tidy(stored) == stored, "python gallery/notebooks.py"
    text = path.read_text()
    assert not re.search(r"/(home|root|tmp|work|usr|opt)/|0x[0-9a-f]{6}|site-packages", text)
    kinds = [kind for cell in stored.cells for one in shown(cell) for kind in one]
    assert {"image/png", "text/markdown"} <= set(kinds)


# the scripts do much the same, and one of them is run in the gate
RUN = [pytest.param(n, marks=pytest.mark.slow) for n in EXPERIMENTS]


@pytest.mark.parametrize("name", RUN)
def test_notebooks_show_what_they_did(name: str, tmp_path: Path) -> None:
    stored = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    done = execute(stored, tmp_path)
    for cell, again in zip(stored.cells, done.cells, strict=True):
        assert shown(again) == shown(cell), f"{cell.source}\npython gallery/notebooks.py {name}"
        for output in again.get("outputs", []):
            if output.get("name") == "stderr":
                assert unexpected(output["text"]) == []
    assert {p.name for p in tmp_path.iterdir()} <= {"lightning_logs"}
