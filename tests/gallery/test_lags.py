"""Does learning the weights of lags pay: rates, verdicts and tables from made-up results of known differences."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from gallery.recipe import Folders
from gallery.recipes import lags as recipe
from gallery.recipes import lags_smooth
from lightning_toys.bilevel.regression.algorithms import NAMED
from tests.gallery.made_up import write_results

# the others have lag_1's 3
LOSS = {"funcbo": 2.0, "aid": 4.0, "unroll1": 2.7, "least_squares": 1.5, "fixed": 2.7}
TUNED, SCORED = [100, 101, 102, 103], list(range(10, 18))


def content(loss: float, seeds: list[int], regret: float = 1.0, key: int = 0) -> str:
    base = np.random.default_rng(7).normal(0, 0.5, len(seeds))  # shared by all: what pairing takes out
    found = list(loss + base + np.random.default_rng(key + 1).normal(0, 0.01, len(seeds)))
    metrics = {name: {"values": found} for name in ("outer_loss_all", "outer_loss")}
    metrics["local_regret_all"] = {"values": [regret * (1 + 0.01 * s) for s in range(len(seeds))]}
    return json.dumps({"stage": "fit", "seeds": seeds, "settings": {}, "metrics": metrics})


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("runs")
    folders = {run.name: root / run.folder for run in (*recipe.RECIPE.runs, *lags_smooth.RECIPE.runs)}
    for setting, name in product(recipe.SETTINGS, recipe.METHODS):
        run = recipe.RATES_LEARNED if name in recipe.LEARNED else recipe.RATES_CONTROLS
        key = "outer_lr" if name in recipe.LEARNED else "fixed_weights"
        for inner, other in recipe.tried(setting, name):
            place = f"config={setting},algorithm={name},inner_lr={inner}" + (f",{key}={other}" if other else "")
            best = (inner, other) == recipe.CHOSEN[setting][name]
            write_results(folders[run.name] / place, content(1.0 if best else 2.0, TUNED))
        text = content(LOSS.get(name, 3.0), SCORED, key=recipe.METHODS.index(name))
        write_results(folders[recipe.run_name(setting)] / name, text)
    for stream, name, n in product(lags_smooth.STREAMS, lags_smooth.SMOOTHED, lags_smooth.SMOOTHING):
        for rate in recipe.OUTER:
            place = f"config={stream},algorithm={name},smoothing={n},outer_lr={rate}"
            loss = 1.0 if rate == lags_smooth.CHOSEN_SMOOTH[stream, name, n] else 2.0
            write_results(folders["lags_rates_smooth"] / place, content(loss, TUNED))
        text = content(3.0 + int(n) / 100, SCORED, 1 / int(n), int(n))
        write_results(folders["lags_smooth"] / f"{stream},{name},{n}", text)
    return Folders(folders, full=True)


def test_verdicts_are_those_of_the_differences(at: Folders) -> None:
    lines = recipe.verdict_table(at).split("\n")
    assert len(lines) == 2 + 5 * 4
    for name, verdict in {
        "funcbo": "pays",
        "aid": "costs",
        "unroll1": "no significant difference",
        "least_squares": "pays",
    }.items():
        rows = [line for line in lines if f"| {name} |" in line]
        assert len(rows) == 5
        assert all(f"| {verdict} |" in line for line in rows), name
    assert recipe.verdicts_of("funcbo")(at) == "pays on 5 and costs on 0 of 5 streams"
    assert recipe.verdicts_of("aid")(at) == "pays on 0 and costs on 5 of 5 streams"
    assert recipe.verdicts_of("unroll1")(at) == "pays on 0 and costs on 0 of 5 streams"
    assert recipe.gap("regression", "aid", "fixed")(at).startswith("1.")  # 4 minus 2.7
    assert recipe.later("aid", "fixed", recipe.SCORE)(at) == recipe.gap("regression", "aid", "fixed")(at)


def test_what_the_oracle_leaves_is_a_share_of_the_last_observation_s_loss(at: Folders, tmp_path: Path) -> None:
    """Of every stream but the slow one."""
    assert recipe.optimum_leaves(at) == "100 to 100 %"
    places = Folders(at, full=True)
    for setting, loss in (("regression", 1.5), ("regression_slow", 0.3)):
        places[recipe.run_name(setting)] = tmp_path / setting
        for name in recipe.METHODS:
            level = loss if name == "optimum" else 3.0
            write_results(tmp_path / setting / name, content(level, SCORED, key=recipe.METHODS.index(name)))
    least, most = recipe.optimum_leaves(places).removesuffix(" %").split(" to ")
    assert abs(int(least) - 50) < 5, least
    assert most == "100"


def test_each_pair_is_compared_once_and_all_are_one_family(at: Folders) -> None:
    found = recipe.comparisons(at)
    pairs = [frozenset((a, b)) for s, a, b, m in found if (s, m) == ("regression", "outer_loss")]
    assert len(pairs) == len(set(pairs)) == 8 + 7 + 6 + 5
    assert len(found) == 5 * 2 * len(pairs)
    p = recipe.p_values(at)
    least = min(p, key=lambda k: p[k])
    assert p[least] == pytest.approx(len(found) * found[least].p_value)  # Holm's first of all of them


def test_tables_have_every_method(at: Folders) -> None:
    for setting in recipe.SETTINGS:
        lines = recipe.study_table(at, setting).split("\n")
        assert len(lines) == 2 + len(recipe.METHODS)
        assert {line.count("|") for line in lines} == {9}
    assert "| funcbo | 1.9" in recipe.study_table(at, "regression")
    assert Path(recipe.drawing(at)).read_bytes().startswith(b"\x89PNG")
    smooth = lags_smooth.smooth_table(at).split("\n")
    assert len(smooth) == 2 + 2 * 2 * 3
    assert {line.count("|") for line in smooth} == {11}
    row = next(line for line in smooth if "| shipped | funcbo | 100 |" in line)
    assert ".0100 (.0100 to .0100)" in row, row
    assert ".99" in row, row


def test_rates_that_the_search_did_not_choose_are_refused(at: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(recipe.rates_table(at).split("\n")) == 2 + len(recipe.METHODS)
    monkeypatch.setitem(recipe.CHOSEN["regression_slow"], "aid", ("1e-2", "0.1"))
    with pytest.raises(ValueError, match="regression_slow, aid: the search chose"):
        recipe.rates_table(at)
    monkeypatch.setitem(lags_smooth.CHOSEN_SMOOTH, ("regression", "aid", "10"), "0.3")
    with pytest.raises(ValueError, match=r"the search chose 0\.1, the recipe has 0\.3"):
        lags_smooth.smooth_table(at)


def test_no_table_is_made_of_rates_that_the_search_did_not_choose(at: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipe.CHOSEN["regression"], "lag_1", ("1e-3", ""))
    for make in (recipe.verdict_table, recipe.drawing, lambda at: recipe.study_table(at, "regression_noisy")):
        with pytest.raises(ValueError, match="regression, lag_1: the search chose"):
            make(at)


def test_a_fit_that_went_non_finite_is_a_row(at: Folders, tmp_path: Path) -> None:
    places = Folders(at, full=True)
    copy = tmp_path / "noisy"
    shutil.copytree(at["lags_noisy"], copy)
    (copy / "funcbo/results.json").unlink()
    places["lags_noisy"] = copy
    assert "| funcbo | went non-finite |" in recipe.study_table(places, "regression_noisy")
    assert "| three times the noise | funcbo | went non-finite |" in recipe.verdict_table(places)
    shutil.copytree(at["lags_slow"], tmp_path / "slow")
    (tmp_path / "slow/fixed/results.json").unlink()
    without = Folders({**at, "lags_slow": tmp_path / "slow"}, full=True)
    assert "| a period of 126 | funcbo | a baseline went non-finite |" in recipe.verdict_table(without)
    assert "went non-finite" not in recipe.study_table(places, "regression")
    assert len(recipe.comparisons(places)) == len(recipe.comparisons(at)) - 2 * len(recipe.OVER)
    recipe.drawing(places)
    shutil.copytree(at["lags_smooth"], tmp_path / "smooth")
    (tmp_path / "smooth/regression,aid,10/results.json").unlink()
    places["lags_smooth"] = tmp_path / "smooth"
    row = next(r for r in lags_smooth.smooth_table(places).split("\n") if "| shipped | aid | 10 |" in r)
    assert "went non-finite" in row


def test_a_seed_without_a_finite_loss_is_no_choice() -> None:
    text = json.loads(content(1.0, TUNED))
    text["metrics"]["outer_loss_all"]["values"][2] = None
    assert recipe.mean_score(text) == float("inf")
    assert recipe.mean_score(None) == float("inf")
    with pytest.raises(ValueError, match="no finite score"):
        recipe.best_of({("1e-3", ""): float("inf"), ("3e-3", ""): float("inf")})


def test_a_cell_that_went_non_finite_is_told_from_a_search_that_was_not_run(at: Folders, tmp_path: Path) -> None:
    assert recipe.search_cell(at, "regression", "aid", ("1e-1", "0.1")) is None
    with pytest.raises(FileNotFoundError, match="is not there"):
        recipe.finished(tmp_path / "search" / "cell")


def test_methods_are_those_of_the_package() -> None:
    assert set(recipe.METHODS) == set(NAMED)
    folders = [run.folder for run in (*recipe.RECIPE.runs, *lags_smooth.RECIPE.runs)]
    assert len(folders) == len(set(folders))  # a fit that begins anew empties its run's folder
    for run in (*recipe.RECIPE.runs, *lags_smooth.RECIPE.runs):
        assert all(f"--run.variant {Path(run.folder).name}" in c for c in run.commands), run.name
