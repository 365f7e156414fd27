"""What must a model of the world get right: rates, verdicts and tables from made-up results of known returns."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from gallery.recipe import Folders, Run
from gallery.recipes import agents as recipe
from gallery.recipes import agents_drift, agents_parts
from tests.gallery.made_up import write_results

SEEDS = list(range(10, 26))
VERDICTS = {"vaml_still": "lower, within 50", "vaml_reward": "lower", "vaml": "within 50"}
RUNS = (*recipe.RECIPE.runs, *agents_drift.RECIPE.runs, *agents_parts.RECIPE.runs)
RETURN = {"model_free": 480.0, "mle": 470.0, "vep": 100.0, "vaml_still": 460.0, "vaml_reward": 200.0}  # others 465
RETURN |= {"vaml": 477.0}


def content(mean: float, seeds: list[int], key: int, spread: float = 10.0, step: int = 30_000) -> str:
    found = mean + np.random.default_rng(key).normal(0, spread, len(seeds))
    metrics = {"return": found, "td_error": found / 100, "model_error": found / 1000, "local_regret": found}
    content = {
        "stage": "fit",
        "step": step,
        "seeds": seeds,
        "settings": {},
        "metrics": {name: {"values": list(x)} for name, x in metrics.items()},
    }
    return json.dumps(content)


def write_curve(folder: Path, steps: range, seeds: list[int], level: float) -> None:
    heads: list[object] = ["step", "eval/return", *(f"replicas/eval/return/seed_{s}" for s in seeds)]
    rows: list[list[object]] = [[k, level, *(level + s % 7 for s in seeds)] for k in steps]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [",".join(map(str, row)) for row in [heads, *rows]]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("runs")
    folders = {run.name: root / run.folder for run in RUNS}
    for name, run in recipe.SEARCHES.items():
        for lr, inner in recipe.tried(name):
            level = 300.0 if (lr, inner) == recipe.CHOSEN[name] else 200.0
            place = folders[run.name] / f"lr={lr},inner_lr={inner}"
            write_results(place, content(1.0, [100, 101], 0))
            write_curve(place, range(2000, 30001, 2000), [100, 101], level)

    def study(name: str, run: Run, seeds: list[int] = SEEDS) -> None:
        for k in range(len(run.commands)):
            later = len(run.commands) - 1 - k
            mean, key = RETURN.get(name, 465.0) - 10 * later, zlib.crc32(run.folder.encode()) + k
            text = content(mean, seeds, key, step=recipe.STEPS[k])
            place = folders[run.name]
            place.mkdir(parents=True, exist_ok=True)
            (place / (f"results-{k + 1}.json" if later else "results.json")).write_text(text)

    for name, run in recipe.LONG.items():
        study(name, run)
    for name, run in agents_parts.PART.items():
        study(name, run, list(range(10, 46)))
    for (name, _), run in recipe.WIDE.items():
        study(name, run)
    for name in agents_drift.DRIFTING:
        for n in agents_drift.SMOOTHING:
            for rate in recipe.RATES:
                place = folders[f"drift_rates_{name}"] / f"smoothing={n},lr={rate}"
                write_results(place, content(1.0, [100, 101], 0))
                level = 300.0 if rate == agents_drift.CHOSEN_DRIFT[name, n] else 200.0
                write_curve(place, range(2000, 30001, 2000), [100, 101], level)
            place = folders[f"drift_{name}"] / f"smoothing-{n}"
            write_results(place, content(100.0 if n == "1" else 50.0, SEEDS, int(n), 1.0))
            write_curve(place, range(2000, 30001, 2000), SEEDS, 250.0 if n == "1" else 300.0)
    return Folders(folders, full=True)


def test_scores_are_those_of_their_steps(at: Folders) -> None:
    found = recipe.all_scores(at)
    means = [found["vep", "8", n].mean() for n in recipe.STEPS]
    assert means == pytest.approx([80.0, 90.0, 100.0], abs=8)
    assert len(found) == 6 * 3 + 5 * 2


def test_p_values_are_those_of_the_returns(at: Folders) -> None:
    found = recipe.all_scores(at)
    p = recipe.p_values(found)
    # by steps: mle, vep, omd, vaml with model_free, the last three with mle, the published form with omd; by width
    assert len(p) == 3 * (4 + 3 + 1) + 2 * (4 + 3 + 1)
    assert p[("vep", "8", 200_000), ("model_free", "8", 200_000)] < 0.05
    assert p[("omd", "8", 200_000), ("mle", "8", 200_000)] > 0.05
    assert (("vep", "3", 30_000), ("model_free", "8", 30_000)) in p
    assert {b[0] for a, b in p if a[0] == "omd_published"} == {"omd"}


def test_tables_have_every_agent(at: Folders) -> None:
    steps = recipe.study_table(at).split("\n")
    assert len(steps) == 2 + 3 * 6
    assert {line.count("|") for line in steps} == {9}
    last = next(line for line in steps if line.startswith("| 200 000 | vep"))
    assert last.count("**") == 4, last  # below both
    assert len(recipe.width_table(at).split("\n")) == 2 + 3 * 5
    assert len(recipe.errors_table(at).split("\n")) == 2 + 6
    assert Path(recipe.drawing(at)).read_bytes().startswith(b"\x89PNG")


def test_parts_are_lower_or_equivalent(at: Folders) -> None:
    parts = agents_parts.part_table(at).split("\n")
    assert len(parts) == 2 + 5
    asked = {line.split(" | ")[0].strip("| "): line for line in agents_parts.part_questions(at).split("\n")[2:]}
    assert len(asked) == 3
    for name, verdict in VERDICTS.items():
        line = asked[recipe.LABELS[name]]
        assert line.endswith(f"| {verdict} |"), line


def test_drift_is_compared_with_the_unsmoothed_run(at: Folders, tmp_path: Path) -> None:
    drift = agents_drift.drift_table(at).split("\n")
    assert len(drift) == 2 + 2 * 4 + 2  # and the controllers by hand
    assert {line.count("|") for line in drift} == {10}
    assert "| 50 ±" in drift[3], drift[3]
    gain, loss = map(int, re.findall(r"(\d+) %", agents_drift.allowed(at, "vaml")))
    assert (20 <= gain < 30, loss) == (True, 0)  # 50 of 250, and half of an interval
    places = Folders(at, full=True)
    shutil.copytree(at["drift_vaml"], tmp_path / "drift")
    (tmp_path / "drift/smoothing-10/results.json").unlink()
    places["drift_vaml"] = tmp_path / "drift"
    found = agents_drift.drift_table(places).split("\n")
    assert "went non-finite" in found[3]
    assert "| 50 ±" in found[4]


def test_rates_that_the_search_did_not_choose_are_refused(at: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(recipe.rates_table(at).split("\n")) == 2 + 6
    assert len(recipe.rates_table(at, agents_parts.TUNED).split("\n")) == 2 + 5
    monkeypatch.setitem(recipe.CHOSEN, "vep", ("3e-3", "1e-3"))
    with pytest.raises(ValueError, match="vep: the search chose"):
        recipe.rates_table(at)
    for make in (recipe.study_table, recipe.width_table, recipe.drawing):
        with pytest.raises(ValueError, match="vep: the search chose"):
            make(at)
    assert agents_parts.part_questions(at)  # vep is none of its agents
    monkeypatch.setitem(recipe.CHOSEN, "vaml_still", ("3e-3", "1e-3"))
    for make in (agents_parts.part_table, agents_parts.part_questions):
        with pytest.raises(ValueError, match="vaml_still: the search chose"):
            make(at)
    monkeypatch.setitem(agents_drift.CHOSEN_DRIFT, ("omd", "10"), "3e-3")
    with pytest.raises(ValueError, match="the search chose 1e-3, the recipe has 3e-3"):
        agents_drift.drift_table(at)


def test_a_run_that_went_non_finite_has_no_score_from_there_on(at: Folders, tmp_path: Path) -> None:
    run = recipe.LONG["omd"]
    shutil.copytree(at[run.name], tmp_path / "omd")
    (tmp_path / "omd" / "results.json").unlink()
    cut = Folders({**at, run.name: tmp_path / "omd"}, full=True)
    assert ("omd", "8", 50_000) in recipe.all_scores(cut)
    assert ("omd", "8", 200_000) not in recipe.all_scores(cut)
    row = next(line for line in recipe.study_table(cut).split("\n") if line.startswith("| 200 000 | omd (opt"))
    assert "went non-finite" in row
    assert "went non-finite" in recipe.errors_table(cut)
    assert Path(recipe.drawing(cut)).is_file()
    (tmp_path / "omd" / "results.json").write_text("{}")
    (tmp_path / "omd" / "results-3.json").write_text("{}")
    with pytest.raises(ValueError, match="4 results of 3 fits"):
        recipe.scores(cut, run)


def test_a_score_is_of_the_step_that_it_is_called_after(at: Folders, tmp_path: Path) -> None:
    run = recipe.LONG["mle"]
    shutil.copytree(at[run.name], tmp_path / "mle")
    (tmp_path / "mle" / "results-2.json").rename(tmp_path / "mle" / "results-1.json")  # the first is lost
    with pytest.raises(ValueError, match="is of step 50000, not of 30000"):
        recipe.scores(Folders({**at, run.name: tmp_path / "mle"}, full=True), run)


def test_a_cell_of_the_search_that_went_non_finite_is_the_worst(at: Folders, tmp_path: Path) -> None:
    run = recipe.SEARCHES["vep"]
    shutil.copytree(at[run.name], tmp_path / "vep")
    (tmp_path / "vep" / "lr=1e-3,inner_lr=1e-3" / "results.json").unlink()
    cut = Folders({**at, run.name: tmp_path / "vep"}, full=True)
    assert recipe.score(cut, "vep", ("1e-3", "1e-3")) == 0.0
    with pytest.raises(FileNotFoundError):
        recipe.score(cut, "vep", ("1e-2", "1e-3"))


def test_a_permutation_test_has_its_level_and_its_power() -> None:
    g = np.random.default_rng(3)
    null = [recipe.permutation_p(tuple(g.normal(size=16)), tuple(g.normal(size=16) * 3)) for _ in range(40)]
    assert 0 <= sum(p < 0.05 for p in null) <= 6  # binomial(40, .05): more than 6 once in 300 times
    assert recipe.permutation_p(tuple(g.normal(size=16)), tuple(g.normal(size=16) + 3)) < 0.001


def test_equivalence_needs_the_margin() -> None:
    g = np.random.default_rng(4)
    a = 400 + g.normal(0, 20, 16)
    assert agents_parts.within_p(a, a + 1, 50) < 0.05 < agents_parts.within_p(a, a + 49, 50)
    assert agents_parts.within_p(np.full(16, 500.0), np.full(16, 500.0), 50) == 0.0
    assert agents_parts.within_p(np.full(16, 500.0), np.full(16, 400.0), 50) == 1.0


def test_each_run_has_its_own_folder_and_the_rates_chosen() -> None:
    folders = [run.folder for run in RUNS]
    assert len(folders) == len(set(folders))
    for name, run in (*recipe.LONG.items(), *agents_parts.PART.items()):
        words = shlex.split(run.commands[0])
        assert [words[words.index(f"--model.{k}") + 1] for k in ("lr", "inner_lr")] == list(recipe.CHOSEN[name])
        ends = [int(c.rpartition(" ")[2]) for c in run.commands]
        assert ends == list(recipe.STEPS)[: len(ends)]


def test_controllers_by_hand_balance_and_see_the_centre() -> None:
    """Upright earns all there is where it is rewarded and nothing where it is not; leaning earns some of it there."""
    for knows in (False, True):
        assert agents_drift.hand_written(0.0, knows) == 500.0
        assert agents_drift.hand_written(-4.7, knows) > 480
    for centre in (7.6, -7.6):
        assert agents_drift.hand_written(centre, knows=False) < 5
        assert agents_drift.hand_written(centre, knows=True) > 100
