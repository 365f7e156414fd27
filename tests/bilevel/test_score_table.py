"""Interquartile means, bootstrap intervals and probabilities of improvement: against scipy and closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, trim_mean

from lightning_toys.bilevel.score_table import bootstrap, interquartile_mean, main, probability_of_improvement
from tests.commands.compare.runs_of_others import METRIC, WHOLE, a_run

RNG = np.random.default_rng(3)


@pytest.mark.parametrize("n", [1, 3, 4, 7, 8, 16])
def test_the_interquartile_mean_is_scipys(n: int) -> None:
    x = RNG.normal(size=(5, n))
    np.testing.assert_allclose(interquartile_mean(x), trim_mean(x, 0.25, axis=1))


def test_the_probability_of_improvement_is_mann_whitneys() -> None:
    x, y = RNG.integers(0, 6, 9).astype(float), RNG.integers(0, 6, 7).astype(float)
    assert probability_of_improvement(x, y) == pytest.approx(mannwhitneyu(x, y).statistic / 63)
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1)
    assert probability_of_improvement(x, x - 10) == 1


def test_the_bootstraps_interval_covers() -> None:
    """Of a mean of 200 it is 1.96 standard errors on either side; samples are drawn apart."""
    x = RNG.normal(size=200)
    found = bootstrap(lambda z: z.mean(-1), x)
    error = x.std() / 200**0.5
    assert found.value == x.mean()
    assert (found.high - found.value) / error == pytest.approx(1.96, abs=0.08)
    assert (found.value - found.low) / error == pytest.approx(1.96, abs=0.08)
    gap = bootstrap(lambda a, b: (a - b).mean(-1), x, x)  # 0 throughout, were both drawn with one index
    assert (gap.high - gap.low) / error == pytest.approx(2 * 1.96 * 2**0.5, abs=0.2)


def a_scored_run(folder: Path, label: str, values: list[float]) -> Path:
    metrics = {"return": METRIC | {"values": values, "mean": float(np.mean(values))}}
    seeds = list(range(len(values)))
    path = a_run(folder, WHOLE | {"label": label, "seeds": seeds, "metrics": metrics})
    head = ",".join(["step", *(f"replicas/eval/return/seed_{s}" for s in seeds)])
    rows = [",".join(str(v) for v in (step, *(step + np.array(values)).tolist())) for step in (10, 20)]
    (path / "metrics.csv").write_text("\n".join([head, *rows]) + "\n")
    return path


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_scored_run(tmp_path / "a", "mle", [1.0, 2.0, 3.0, 50.0])
    a_scored_run(tmp_path / "b", "omd", [0.0, 0.5, 0.7, 0.9])
    assert main([str(tmp_path), "--over", "mle", "--steps", "10,20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("| mle | 10 | 4 | 12.5 [")  # the middle of 11, 12, 13 and 60
    assert lines[2].endswith("| 24 | - | 11, 12, 13, 60 |")
    assert "| 0 [0, 0] |" in lines[3]  # never above
    assert lines[4].startswith("| mle | 20 | 4 | 22.5 [")
    assert main([str(tmp_path)]) == 0
    assert "| omd | end | 4 | 0.6 [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--over", "ml"], "--over: 'ml' is not allowed; give one of mle"),
        (["--metric", "retrun"], "did you mean 'return'?"),
        (["--steps", "15"], "has no eval/return at step 15; it has 10 to 20"),
        (["--steps", "x"], "--steps: 'x' is not allowed"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    a_scored_run(tmp_path / "a", "mle", [1.0, 2.0])
    assert main([str(tmp_path), *words]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert main([str(tmp_path / "none")]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert json.loads((tmp_path / "a" / "results.json").read_text())["label"] == "mle"
