"""Drawn targets: ratios, signs and counts from made-up results of known ratios."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from gallery.recipe import Folders
from gallery.recipes import drawn as recipe
from tests.gallery.made_up import write_results

# rival / regression
FACTORS = {"flow": 1.5, "linear": 0.5, "cubic_spline": 0.01, "gaussian_process": 1.0}


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("runs")
    g = np.random.default_rng(3)
    for run, k, terms in product(recipe.RUNS, recipe.TARGETS, recipe.TERMS):
        base = float(np.exp(g.normal()))  # targets differ by far more than methods do

        def near(factor: float, base: float = base) -> float:
            return float(base * factor * np.exp(0.05 * g.normal()))

        references = {name: {"l2": near(f)} for name, f in FACTORS.items() if name != "flow"}
        for mode in ("regression", "flow"):
            factor = FACTORS.get(mode, 1.0)
            # of four seeds the mean counts, of which one is far off
            values = [near(factor) * x for x in (0.5, 0.5, 0.5, 2.5)]
            folder = root / run.folder / f"mode={mode},phase_seed={k},components={terms}"
            content = {"stage": "test", "seeds": [0, 1, 2, 3], "settings": {}, "references": references}
            write_results(folder, json.dumps(content | {"metrics": {"l2": {"values": values}}}))
    return Folders({run.name: root / run.folder for run in recipe.RUNS}, full=True)


def test_ratios_are_paired_by_target(at: Folders) -> None:
    found = recipe.ratios(at)
    assert len(found) == 2 * 2 * 4
    for (_, _, name), ratio in found.items():
        assert ratio.value == pytest.approx(FACTORS[name], rel=0.15)
        assert ratio.dof == len(recipe.TARGETS) - 1
        assert ratio.error < 0.1, "not paired: targets differ by a factor of e"


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.replace(" and", ",").split(", ")]


def test_signs_and_counts(at: Folders) -> None:
    rows = recipe.study_table(at).splitlines()[2:]
    assert len(rows) == 4
    for row in rows:
        signs = [cell.split()[-1] for cell in row.strip("| ").split(" | ")[3:]]
        assert signs == ["+", "-", "-", "?"]
    assert recipe.counts(at) == "8, 8, 8 and 8 of 8"
    assert all(0 < p < 1e-3 for p in numbers(recipe.flow_p(at)))


def test_a_sign_is_shown_after_holms_adjustment_alone(at: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio of p = .01 is none of sixteen; in the family's place it is the first that fails."""
    found = recipe.ratios(at)
    keys = list(found)
    weak = {key: replace(found[key], log=0.1, error=0.1 / 3.5) for key in keys}  # t of 7 degrees: p = .01
    assert weak[keys[0]].p_value == pytest.approx(0.01, abs=0.001)
    assert {recipe.sign(weak[k], p) for k, p in recipe.adjusted(weak).items()} == {"?"}
    strong = weak | {keys[0]: replace(weak[keys[0]], error=0.01)}
    p_values = recipe.adjusted(strong)
    assert [recipe.sign(strong[k], p_values[k]) for k in keys] == ["+", *["?"] * 15]
    assert recipe.sign(replace(strong[keys[0]], log=-0.1), 0.01) == "-"
    assert recipe.sign(strong[keys[0]], 0.05) == "?"


def test_counts_and_p_are_of_each_kind(at: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the table's order: kinds of points, then terms."""
    levels = {"drawn_grid": {3: 2.0, 8: 0.5}, "drawn_random": {3: 0.5, 8: 2.0}}

    def errors(_: Folders, run: str, terms: int) -> dict[str, dict[int, float]]:
        base = {k: 1.0 + 0.01 * k * k for k in recipe.TARGETS}
        flow = {k: levels[run][terms] * (1 + 0.01 * k) for k in recipe.TARGETS}
        return {"regression": base, "flow": flow} | dict.fromkeys(list(recipe.RIVALS)[1:], base)

    monkeypatch.setattr(recipe, "errors", errors)
    assert recipe.counts(at) == "8, 0, 0 and 8 of 8"
    assert len(numbers(recipe.flow_p(at))) == 4


@pytest.mark.parametrize("run", recipe.RUNS, ids=lambda run: run.name)
def test_commands_train_the_cells_that_are_read(run: recipe.Run) -> None:
    cells = set()
    for command in run.commands:
        words = shlex.split(command)
        given = dict(zip(words[1::2], words[2::2], strict=True))
        seed = given["--data.target.frequency_seed"]
        assert given["--grid.data.target.phase_seed"] == f"[{seed}]"
        lists = [given[f"--grid.{k}"].strip("[]").split(",") for k in ("model.mode", "data.target.components")]
        cells |= {f"mode={mode},phase_seed={seed},components={terms}" for mode, terms in product(*lists)}
        assert run.folder.endswith(given["--run.variant"])
    wanted = product(("regression", "flow"), recipe.TARGETS, recipe.TERMS)
    assert cells == {f"mode={m},phase_seed={k},components={t}" for m, k, t in wanted}
    assert Path(recipe.CONFIG).is_file()
