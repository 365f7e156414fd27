"""The mixtures' tables: who is best at a budget, and who does not differ, from made-up curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery import kept, running
from gallery.recipe import Folders, Run
from gallery.recipes import mixture_controls as controls
from gallery.recipes import mixtures as recipe


def curve(costs: list[float], levels: list[float], spread: float = 0.01, key: int = 0) -> dict[str, Any]:
    noise = np.exp(spread * np.random.default_rng(key).normal(size=(4, len(costs))))
    return {"evaluations": costs, "w1": (np.array(levels) * noise).tolist()}


def test_best_at_a_budget() -> None:
    curves = {
        "cheap": curve([5.0, 50.0], [0.4, 0.3], key=1),
        "like cheap": curve([8.0], [0.401], 0.05, key=2),
        "good": curve([20.0, 200.0], [0.2, 0.05], key=3),
        "lost": curve([10.0], [float("nan")], key=4),
    }
    assert recipe.best_at(curves, 1) == ["-", "-", "-"]
    best, level, alike = recipe.best_at(curves, 10)
    name, bracket = alike.rsplit(" (", 1)  # its own W1 beside its name: with few seeds far is not shown either
    assert (best, name) in {("cheap", "like cheap"), ("like cheap", "cheap")}
    assert float(bracket.rstrip(")")) == pytest.approx(0.4, rel=0.05)
    assert float(level) == pytest.approx(0.4, rel=0.05)
    assert recipe.best_at(curves, 100)[::2] == ["good", "none"]
    assert float(recipe.best_at(curves, 1000)[1]) == pytest.approx(0.05, rel=0.05)


def test_more_budget_is_never_worse() -> None:
    """A sampler that gets worse with more steps stands with its better setting."""
    curves = {"drifts": curve([10.0, 100.0], [0.1, 0.5])}
    assert recipe.best_at(curves, 1000) == recipe.best_at(curves, 10)


@pytest.fixture
def at(tmp_path: Path) -> Folders:
    names = ["mala", "smc_twisted", "smc_tempered", "fk_difference", "fkc"]
    metrics = {f"{m}@{n}": {"values": [0.1, 0.11, 0.09, 0.1]} for n in names for m in recipe.COLUMNS}
    metrics["ess_fraction@importance"] = {"values": [0.4, 0.5, 0.3, 0.4]}
    metrics |= {f"evaluations@{n}": {"values": [100.0] * 4} for n in names}
    verdicts = {n: {"implementation": "agrees", "goal": "differs"} for n in names}
    curves = {n: curve([10.0, 100.0], [0.4, 0.1 * (k + 1)]) for k, n in enumerate(names)}
    rows = {"exact_draws": {"w1": 0.003, "reward": 1.0}, "untilted": {"w1": 0.5, "reward": 0.2}}
    rows["exact_draws_of_budgets"] = {"w1": 0.007}
    content = {
        "stage": "test",
        "seeds": [0, 1, 2, 3],
        "settings": {},
        "metrics": metrics,
        "references": rows,
        "arrays": {"verdicts": verdicts, "frontier": curves, "checks": [1]},
    }
    folders = {}
    for run in recipe.RECIPE.runs:
        folders[run.name] = tmp_path / run.folder
        folders[run.name].mkdir(parents=True)
        content = json.loads(json.dumps(kept.condensed(content))) | {"arrays": content["arrays"]}
        (folders[run.name] / "results.json").write_text(json.dumps(kept.condensed(content)))
    for name in ("wrong_versions", "guidance_grid"):
        (folders[name] / "table.md").write_text("131072 draws each; errors: ...\n\n| wrong | errors |\n|---|---:|\n")
    return Folders(folders, full=True)


def test_tables_are_made_of_what_is_kept(at: Folders) -> None:
    made = {e.name: e.make(at) for e in recipe.RECIPE.tables if callable(e.make)}
    assert made.keys() == {f"mirror.{n}" for n in (*recipe.MAIN, "budgets", "particles", "wrong", "grid")}
    assert made["mirror.strong"].endswith("importance weights, of a draw: .40.")
    lines = made["mirror.mixture"].splitlines()
    assert lines[2].startswith("| mala | ")
    assert lines[2].endswith("| 100 | agrees | differs |")
    assert lines[-2].startswith("| *exact draws* | .00300 | - | - | 1.00 | - |")
    budgets = made["mirror.budgets"].splitlines()
    assert len(budgets) == 2 + 2 * 5
    assert all(line.endswith("| .0070 |") for line in budgets[2:])
    assert made["mirror.wrong"].startswith("| wrong | errors |")
    for figure in (recipe.reward_figure, recipe.budgets_figure):
        assert Path(figure(at)).read_bytes().startswith(b"\x89PNG")


def test_a_module_is_run_with_its_table_as_out(tmp_path: Path) -> None:
    run = Run("x", ("-m some.module --flag",), "mirror_descent/gallery/x", "0", 1, None)
    words = running.words_of(run, run.commands[0], tmp_path, full=True)
    assert words == ["-m", "some.module", "--flag", "--out", str(tmp_path / "mirror_descent/gallery/x/table.md")]
    say = Run("x", ("-m this_module_is_not_there",), "mirror_descent/gallery/x", "0", 1, None)
    with pytest.raises(RuntimeError, match="No module named this_module_is_not_there"):
        running.perform(say, tmp_path, full=True)


def test_the_controls_of_mixtures(tmp_path: Path) -> None:
    """W1 of each sampler by strength and by dimension; what guidance leaves is a share of the untilted error."""
    folders = {}
    for run in controls.RECIPE.runs:
        names = list(controls.SAMPLERS)
        if run in controls.GUIDED.values():
            names = [f"sde_{rule}_{scale}" for rule in controls.RULES for scale in controls.SCALES]
        level = 0.2 if run is controls.GUIDED["Linear"] else 0.3
        metrics = {f"evaluations@{n}": {"values": [1.0] * 4} for n in names}
        for metric in ("w1", "mode_tv", "reward"):
            metrics |= {f"{metric}@{n}": {"values": [level + 0.01 * k] * 4} for k, n in enumerate(names)}
        metrics["ess_fraction@importance"] = {"values": [0.4] * 4}
        known = {"w1": 0.003, "mode_tv": 0.4, "reward": 1.0}
        folders[run.name] = tmp_path / run.folder
        folders[run.name].mkdir(parents=True)
        content = {"stage": "test", "seeds": [0, 1, 2, 3], "settings": {}, "metrics": metrics, "arrays": {}}
        content["references"] = {"exact_draws": known, "untilted": known}
        (folders[run.name] / "results.json").write_text(json.dumps(content))
    at = Folders(folders, full=True)
    made = {e.name: e.make(at) for e in (*controls.RECIPE.tables, *controls.RECIPE.numbers) if callable(e.make)}
    assert made["mirror.guided.left"] == "50 %"
    assert made["mirror.strong_4096"].startswith(".33")
    for name, count in (("strengths", len(controls.STRENGTHS)), ("dimensions", len(controls.DIMENSIONS))):
        rows = made[f"mirror.{name}"].splitlines()[2:]
        assert len(rows) == count
        assert all(row.startswith(("| 1 | .40 |", "| 1 + 1 | .40 |")) for row in rows[:1])
        assert all(row.endswith("| .0030 |") for row in rows)
    modes = made["mirror.dimensions.modes"].splitlines()[2:]
    assert [row.split(" | ")[1:3] for row in modes] == [[".00300", ".400"]] * len(controls.DIMENSIONS)
    assert modes[0].split(" | ")[3].startswith(".3400 ")  # sde_dps, the fifth of the samplers
    guided = made["mirror.guided"].splitlines()[2:]
    assert len(guided) == 2 * 2 * 3 + 2
    assert guided[0].startswith("| dps | Linear | 0.7 | ")
    assert guided[9].startswith("| tfg | Constant | 0.7 | ")
