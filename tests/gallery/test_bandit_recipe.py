"""The bandit's and MultiGoal's tables: signs, families and cells from made-up results of known differences."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from gallery import kept, read
from gallery.recipe import Folders
from gallery.recipes import bandit as recipe
from tests.gallery.made_up import write_results

# regret and soft_gap of each policy with the learned critic; the known one takes .05 away from the Gaussian alone
LEVELS = {"gaussian": 0.3, "gaussian_mirror": 0.2, "meanflow": 0.1, "flow": 0.2}
METRICS = {*recipe.BANDIT, *recipe.GOALS}


def content(level: float, key: int, learned: bool, hills: int = 0) -> str:
    seeds = np.random.default_rng(5).normal(0, 0.1, 8)  # shared by all, which pairing takes out
    own = np.random.default_rng(key).normal(0, 0.01, 8)
    metrics = {m: {"values": list(level + seeds + own)} for m in METRICS}
    metrics["critic_evaluations"] = {"values": [64000.0] * 8}
    if not learned:
        del metrics["critic_error"]
    references = {f"top_of_hill_{k}": {"regret": 0.1 * k} for k in range(hills)}
    references |= {"uniform": {"regret": 0.905, "soft_gap": 2.0}, "optimal": {"soft_gap": 0.0, "goal_tv": 0.02}}
    known = {"stage": "fit", "seeds": list(range(8)), "settings": {}, "metrics": metrics, "references": references}
    walks = np.random.default_rng(key).normal(size=(6, 7, 2)).round(3).tolist()
    return json.dumps(known | {"arrays": {"trajectories": walks}})


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("runs")
    folders = {run.name: root / run.folder for run in recipe.RECIPE.runs}

    for k, runs in enumerate((recipe.CONTROLS, recipe.EQUAL, recipe.MULTIGOAL)):
        for j, (policy, critic) in enumerate(product(recipe.POLICIES, recipe.CRITICS)):
            level = LEVELS[policy] - (0.05 if (policy, critic) == ("gaussian", "known") else 0)
            write_results(
                folders[runs[policy].name] / f"policy={policy},critic={critic}",
                content(level, 100 * k + j, critic == "learned", hills=3 if runs is recipe.CONTROLS else 0),
            )
    for j, name in enumerate(recipe.CHANGES):
        write_results(folders[recipe.CHANGED.name] / name, content(0.0, 900 + j, True))
    write_results(folders[recipe.ALPHA.name] / "small", content(0.25, 990, True))
    return Folders(folders, full=True)


def rows(table: str) -> dict[str, list[str]]:
    """Return a table's rows by their first cell (or first two, joined)."""
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    return {line[0] if len(line) == 3 else f"{line[0]}, {line[1]}": line for line in lines}


def test_questions_have_the_sign_of_a_minus_b(at: Folders) -> None:
    found = rows(recipe.bandit_questions(at))
    assert len(found) == len(recipe.QUESTIONS) + len(recipe.CHANGES) == 13
    wanted = {
        "SMFP, one step minus Gaussian, mirror descent, critic learned": -0.1,
        "Gaussian, mirror descent minus Gaussian, SAC, critic learned": -0.1,
        "Gaussian, SAC: critic learned minus known": 0.05,
        "flow with SMFP's noise minus flow, 8 Euler steps": -0.2,
    }
    for name, difference in wanted.items():
        assert float(found[name][1].split(" ± ")[0]) == pytest.approx(difference, abs=0.02), name
        assert float(found[name][2]) < 0.05
    assert float(found["flow, 8 Euler steps: critic learned minus known"][2]) > 0.05


def test_a_change_is_written_with_its_sign(at: Folders) -> None:
    assert float(recipe.changed_by("flow_noise")(at).split(" ± ")[0]) == pytest.approx(-0.2, abs=0.02)


def test_the_small_alpha_is_set_beside_both_updates(at: Folders) -> None:
    for policy, expected in {"gaussian": -0.05, "gaussian_mirror": 0.05}.items():
        assert float(recipe.small_alpha_minus(policy)(at).split(" ± ")[0]) == pytest.approx(expected, abs=0.02)


def test_seeds_on_a_lower_hill_are_counted(at: Folders) -> None:
    """.3 and .25 plus shared noise of .1, the second hill's top being .1."""
    for critic in recipe.CRITICS:
        found = read.values(recipe.cells(at, recipe.CONTROLS)["gaussian", critic], "regret")
        expected = sum(x >= 0.1 for x in found)
        assert recipe.on_a_lower_hill(critic)(at) == f"{expected} of 8"
        assert expected > 0
    low, high = (float(x) for x in recipe.seeds_between("meanflow", "learned")(at).split(" to "))
    assert low < 0.1 < high


def test_p_values_are_of_the_whole_family(at: Folders) -> None:
    by = recipe.cells(at, recipe.CONTROLS)
    one = read.difference(by["meanflow", "learned"], by["gaussian_mirror", "learned"], "regret")
    several = rows(recipe.difference_table("x", {"a": one, "b": one, "c": one}))
    alone = rows(recipe.difference_table("x", {"a": one}))
    assert float(several["a"][2]) == pytest.approx(3 * float(alone["a"][2]), rel=0.1)


def test_tables_have_every_cell(at: Folders) -> None:
    bandit, goals = rows(recipe.controls_table(at)), rows(recipe.multigoal_table(at))
    assert len(bandit) == 8 + 1
    assert bandit["flow, 8 Euler steps, known"][-1] == "6.4e+04"
    assert bandit["reference: uniform, -"][2] == ".905"
    assert len(goals) == 8 + 2
    assert goals["Gaussian, SAC, known"][-1] == "-"
    assert goals["reference: optimal, -"][2:5] == ["0", "-", ".02"]
    assert "SMFP without noise, one step, known" in goals  # as its configuration has it
    assert "SMFP, one step, known" in bandit


def test_episodes_are_drawn_of_what_is_kept(at: Folders) -> None:
    run = recipe.MULTIGOAL["flow"]
    cell = json.loads((at[run.name] / "policy=flow,critic=learned" / "results.json").read_text())
    assert kept.condensed(cell)["arrays"]["trajectories"] == cell["arrays"]["trajectories"]
    for picture in (Path(recipe.episodes(at)), Path(recipe.regrets(at))):
        head = picture.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert int.from_bytes(head[16:20], "big") <= 600  # legible on a narrow page


def test_seeds_on_the_best_hill() -> None:
    """A share above one half counts, and only those seeds' regrets are written."""
    metrics = {"share_mode0": [1.0, 0.5, 0.51, 0.0], "regret": [0.2, 0.9, 0.1, 0.7]}
    content = {"seeds": [0, 1, 2, 3], "metrics": {name: {"values": v} for name, v in metrics.items()}}
    assert recipe.on_the_best_hill(content) == "2 of 4"
    assert recipe.regret_on_the_best(content) == ".100 to .200"
    assert recipe.share_and_seeds(content, "share_mode0") == ".50 (2 of 4)"


def test_what_was_asked_afterwards_has_the_sign_of_a_minus_b(at: Folders) -> None:
    """Each row beside SAC's Gaussian, by the cells' own means."""
    by = recipe.cells(at, recipe.MULTIGOAL)
    rows = [line.strip("| ").split(" | ") for line in recipe.multigoal_later(at).splitlines()[2:]]
    assert len(rows) == 4
    expected = [
        np.mean(read.values(by[p, c], "soft_gap")) - np.mean(read.values(by["gaussian", c], "soft_gap"))
        for c in recipe.CRITICS
        for p in ("meanflow", "flow")
    ]
    assert [float(row[1].split(" ± ")[0]) for row in rows] == pytest.approx(expected, abs=0.002)
    assert any(abs(x) > 0.01 for x in expected)
