"""Drawn targets: ratios, signs and counts from made-up results of known ratios."""

from __future__ import annotations

import json
import shlex
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


def test_signs_and_counts(at: Folders) -> None:
    rows = recipe.study_table(at).splitlines()[2:]
    assert len(rows) == 4
    for row in rows:
        signs = [cell.split()[-1] for cell in row.strip("| ").split(" | ")[3:]]
        assert signs[:3] == ["+", "-", "-"]
    assert recipe.counts(at) == "32 of 32"
    assert float(recipe.worst_p(at)) < 0.05


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
