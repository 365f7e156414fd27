"""Which objective reaches regression's error: tables and signs from made-up results of known ratios."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from gallery import kept, manifest
from gallery.recipe import Folders
from gallery.recipes import few_steps as recipe
from lightning_toys.flow_vs_regression import flow_maps, objectives, parametrisations
from tests.gallery.made_up import write_results

# error over regression's: alike, twice, half, and too scattered to say
FACTORS = {"Flow": 2.0, "MeanFlow": 0.5, "VPrediction": 1.01}
SCATTERED = "Shortcut"


def content(factor: float, readouts: list[str], seeds: list[int], spread: float = 0.02) -> str:
    g = np.random.default_rng(7)
    base = np.exp(g.normal(0, 1.0, len(seeds)))  # shared by all: what pairing takes out
    noise = np.exp(spread * np.random.default_rng(int(100 * factor)).normal(size=len(seeds)))
    metrics = {f"l2@zeros/{r}": {"values": list(base * factor * noise)} for r in readouts}
    return json.dumps({"stage": "test", "seeds": seeds, "settings": {}, "metrics": metrics})


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("runs")
    folders = {run.name: root / run.folder for run in recipe.RECIPE.runs}

    for name, noise in product(recipe.OBJECTIVES, recipe.NOISES):
        readouts = list(recipe.READOUTS[name].values())
        for rate in recipe.RATES:
            place = folders["few_steps_rates"] / f"objective={name},lr={rate},noise={noise}"
            write_results(place, content(1.0 if rate == recipe.CHOSEN[name] else 1.5, readouts, [100, 101, 102, 103]))
        for points in recipe.POINTS:
            spread = 1.0 if name == SCATTERED else 0.02
            place = folders["few_steps"] / f"objective={name},num_train={points},noise={noise}"
            write_results(place, content(FACTORS.get(name, 1.0), readouts, list(range(8)), spread))
    return Folders(folders, full=True)


def test_signs_are_those_of_the_ratios(at: Folders) -> None:
    found = recipe.ratios(at)
    signs = recipe.verdicts(found)
    assert len(signs) == 8 * (7 * 3 + 2)
    for name, sign in {"Flow": "+", "MeanFlow": "-", "VPrediction": "=", SCATTERED: "?"}.items():
        of = {s for (who, *_), s in signs.items() if who == name}
        assert of == {sign}, name
    assert found["Flow", 4, 50, "0"].value == pytest.approx(2.0, rel=0.05)


def test_tables_have_every_cell(at: Folders) -> None:
    lines = recipe.study_table(at).split("\n")
    assert len(lines) == 2 + 1 + 7 * 3 + 2
    assert {line.count("|") for line in lines} == {2 + 8 + 1}
    assert "| Flow | 4 | 2.0 + |" in recipe.study_table(at)
    assert "| MeanFlow | 1 | 8 | 0 | 0 | 0 |" in recipe.counts(at)
    assert Path(recipe.drawing(at)).read_bytes().startswith(b"\x89PNG")


def test_a_rate_that_the_search_did_not_choose_is_refused(at: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(recipe.rates_table(at).split("\n")) == 2 + len(recipe.OBJECTIVES)
    other = next(r for r in recipe.RATES if r != recipe.CHOSEN["Flow"])
    monkeypatch.setitem(recipe.CHOSEN, "Flow", other)
    with pytest.raises(ValueError, match=f"Flow: the search chose .*, the recipe has {other}"):
        recipe.rates_table(at)


def test_readouts_are_those_of_the_objectives() -> None:
    for name, readouts in recipe.READOUTS.items():
        kind = next(getattr(m, name) for m in (objectives, flow_maps, parametrisations) if hasattr(m, name))
        offered = [r.name for r in kind().readouts(["euler"], [1, 2, 4])]
        assert set(readouts.values()) <= set(offered), name
    assert all(f"objective '[{name}]'" in command for name, command in
               zip(recipe.OBJECTIVES, recipe.FEW_STEPS.commands, strict=True))  # fmt: skip
    assert recipe.SEARCH.keeps


def test_the_findings_count_and_span_what_they_name(at: Folders) -> None:
    every = recipe.POINTS, recipe.NOISES
    assert recipe.signs_of(at, "+", ["Flow"], *every) == "24 of 24"
    assert recipe.signs_of(at, "-", ["Flow"], *every) == "0 of 24"
    assert recipe.signs_of(at, "-", ["Flow", "MeanFlow"], [50], ["0"]) == "3 of 6"
    assert recipe.signs_of(at, "+", recipe.OBJECTIVES, *every).endswith(" of 184")
    for name, factor in {"Flow": 2.0, "MeanFlow": 0.5}.items():
        low, high = map(float, recipe.span(at, [name], [1, 2, 4], recipe.POINTS, "0").split(" to "))
        assert (low, high) == pytest.approx((factor, factor), rel=0.05)
    low, high = map(float, recipe.span(at, ["MeanFlow", "Flow"], [4], [50], "0").split(" to "))
    assert (low, high) == pytest.approx((0.5, 2.0), rel=0.05)


def test_the_page_is_what_the_kept_runs_say(tmp_path: Path) -> None:
    """Made again from gallery/kept, every table and number of the study is that of the manifest, to the digit."""
    runs = {run.name: run for run in recipe.RECIPE.runs}
    assert all(kept.unpack(run, tmp_path) for run in runs.values())
    folders = Folders({name: tmp_path / run.folder for name, run in runs.items()}, full=True)
    found = json.loads(manifest.DOCS.read_text())
    made = [(kind, e) for kind in ("tables", "numbers") for e in getattr(recipe.RECIPE, kind)]
    assert len(made) == 3 + 9
    for kind, entry in made:
        assert callable(entry.make)
        assert found[kind][entry.name]["text" if kind == "tables" else "value"] == entry.make(folders)
