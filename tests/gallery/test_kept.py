"""What is kept of a run: results to seven digits, and the columns of metrics.csv that the run names."""

from __future__ import annotations

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from gallery import build, kept, manifest, read
from gallery.recipe import Entry, Folders, Recipe, Run
from gallery.recipes import RECIPES

RUN = Run(
    name="searched",
    commands=("sweep -c a.yaml",),
    folder="bilevel/searched",
    seeds="0",
    minutes=1,
    keeps=True,
    curves=("eval/return", "replicas/eval/return/*"),
)
ROWS = [
    {"step": "1", "train/loss": "0.5", "eval/return": "", "replicas/eval/return/seed_0": ""},
    {"step": "2", "train/loss": "0.4", "eval/return": "123.456789012", "replicas/eval/return/seed_0": "1e-05"},
    {"step": "3", "train/loss": "", "eval/return": "nan", "replicas/eval/return/seed_0": ""},
]


def run_folder(root: Path, cell: str, ended: bool) -> None:
    """Write a cell as a run leaves it."""
    folder = root / RUN.folder / cell
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    if ended:
        content = {"metrics": {"return": {"values": [1 / 3]}}, "stage": "fit", "seeds": [0], "references": {}}
        (folder / "results.json").write_text(json.dumps(content | {"settings": {}}))


def test_curves_are_kept_with_what_ended_and_what_did_not(tmp_path: Path) -> None:
    """Rows and columns that the run names come back, to seven digits; a cell that went non-finite has no results."""
    run_folder(tmp_path / "runs", "lr=1", ended=True)
    run_folder(tmp_path / "runs", "lr=2", ended=False)
    stamp = {"identity": {"commands": list(RUN.commands)}, "seconds": 60}
    kept.keep(RUN, tmp_path / "runs", stamp, tmp_path / "kept")
    assert kept.unpack(RUN, tmp_path / "other", tmp_path / "kept") == stamp
    for cell, ended in (("lr=1", True), ("lr=2", False)):
        folder = tmp_path / "other" / RUN.folder / cell
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows == [
            {"step": "2", "eval/return": "123.4568", "replicas/eval/return/seed_0": "1e-05"},
            {"step": "3", "eval/return": "nan", "replicas/eval/return/seed_0": ""},
        ]
        assert (folder / "results.json").is_file() == ended


def test_files_are_kept_as_they_are(tmp_path: Path) -> None:
    """A table that a module wrote comes back to the letter; one that is not there is left out."""
    files = ("table.md", "shares.json", "samples/step_*.npy")
    run = Run("tabled", ("-m module",), RUN.folder, "0", 1, keeps=True, files=files)
    folder = tmp_path / "runs" / run.folder
    (folder / "samples").mkdir(parents=True)
    (folder / "table.md").write_text('| "a" |\n|---|\n| ± 1 |\n')
    for step in (1, 2):
        np.save(folder / f"samples/step_{step}.npy", np.full((3, 2), np.pi * step, dtype=np.float32))
    (folder / "samples/other.npy").write_bytes(b"not asked for")
    stamp = {"identity": {"commands": list(run.commands)}, "seconds": 60}
    kept.keep(run, tmp_path / "runs", stamp, tmp_path / "kept")
    assert kept.unpack(run, tmp_path / "other", tmp_path / "kept") == stamp
    other = tmp_path / "other" / run.folder
    assert (other / "table.md").read_text() == (folder / "table.md").read_text()
    assert not (other / "shares.json").exists()
    assert sorted(p.name for p in other.glob("samples/*")) == ["step_1.npy", "step_2.npy"]
    assert np.array_equal(np.load(other / "samples/step_2.npy"), np.load(folder / "samples/step_2.npy"))


def test_a_run_without_curves_keeps_none(tmp_path: Path) -> None:
    """Its file is what it was: a stamp and results."""
    plain = Run(name="plain", commands=RUN.commands, folder=RUN.folder, seeds="0", minutes=1, keeps=True)
    run_folder(tmp_path / "runs", "lr=1", ended=True)
    path = kept.keep(plain, tmp_path / "runs", {"identity": {"commands": []}}, tmp_path / "kept")
    assert list(json.loads(path.read_text())) == ["stamp", "results"]


def test_metrics_of_no_match_are_no_curves(tmp_path: Path) -> None:
    """A file without such columns, and one without rows, keep nothing."""
    for text in ("step,train/loss\n1,2\n", "step,eval/return\n", ""):
        (tmp_path / "metrics.csv").write_text(text)
        assert kept.curves(RUN, tmp_path / "metrics.csv") == {}


def test_a_picture_of_a_kept_run_stays_as_it_stands_in_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the run's own folder has it; what is made of results and curves is made anew."""
    monkeypatch.setattr(kept, "unpack", partial(kept.unpack, place=tmp_path / "kept"))
    folder = tmp_path / "runs" / RUN.folder
    folder.mkdir(parents=True)
    content = {"stage": "fit", "seeds": [1], "metrics": {"l2": {"values": [0.25]}}, "settings": {}}
    (folder / "results.json").write_text(json.dumps(content))
    identity = {"commands": list(RUN.commands), "versions": {}, "code": "c"}
    stamp = {"identity": identity, "seconds": 60, "git": {}, "date": "d", "machine": "m", "done": len(RUN.commands)}
    kept.keep(RUN, tmp_path / "runs", stamp, tmp_path / "kept")
    picture = Entry("picture", (RUN.name,), "figures/picture.png")
    number = Entry("number", (RUN.name,), lambda at: str(read.values(read.results(at[RUN.name]), "l2")[0]))
    recipe = Recipe("kept", (RUN,), figures=(picture,), numbers=(number,))
    monkeypatch.setattr(build, "RECIPES", (recipe,))
    found: dict[str, Any] = {"runs": {}, "tables": {}, "numbers": {}, "figures": {"picture": {"sha256": "as it was"}}}
    assert build.collect(found, [recipe], tmp_path / "build", full=True) == []
    assert found["figures"] == {"picture": {"sha256": "as it was"}}
    assert found["numbers"]["number"]["value"] == "0.25"


@pytest.mark.parametrize("recipe", [r for r in RECIPES if any(x.keeps for x in r.runs)], ids=lambda r: str(r.name))
def test_what_is_kept_makes_what_the_pages_have(recipe: Recipe, tmp_path: Path) -> None:
    """Every table and number of runs that are all kept comes out as it stands, and every figure that is drawn of them.

    A figure is as large as in the docs, and about as much of it is not white; single pixels may differ with the
    versions of what draws it.
    """
    every = {run.name: run for r in RECIPES for run in r.runs}
    entries = [(kind, e) for kind in manifest.KINDS for e in getattr(recipe, kind) if callable(e.make)]
    wanted = {name for _, e in entries for name in e.runs}
    there = {name for name in wanted if kept.unpack(every[name], tmp_path) is not None}
    found = json.loads(manifest.DOCS.read_text())
    places = Folders({name: tmp_path / every[name].folder for name in there}, full=True)
    made = {e.name: (kind, e) for kind, e in entries if set(e.runs) <= there}
    assert made or not wanted & there
    for name, (kind, entry) in made.items():
        (content,) = build.make(entry, kind, places, tmp_path).values()
        if kind == "figures":
            drawn, shown = (imread(folder / f"{name}.png")[..., :3] for folder in (tmp_path, build.IMAGES))
            assert drawn.shape == shown.shape, name
            assert (drawn < 1).any(-1).mean() == pytest.approx((shown < 1).any(-1).mean(), rel=0.1), name
        else:
            assert content == found[kind][name]["text" if kind == "tables" else "value"], name


def test_which_runs_are_not_made_again_is_one_line() -> None:
    """Few are named; of a hundred, how many."""
    few = build.what_is_kept([RUN])
    assert RUN.name in few
    assert "gallery/kept/NAME.json" in few
    assert "\n" not in few
    assert "7 runs" in build.what_is_kept([RUN] * 7)


def test_a_kept_run_needs_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is kept is taken where the package of the run is not installed; without it the run is left out."""
    run = dataclasses.replace(RUN, needs="no_such_package")
    monkeypatch.setattr(kept, "read", lambda run: {"stamp": {}})
    assert build.perform_all([run], tmp_path, full=True, jobs=1) == []
    assert "left out" not in capsys.readouterr().out
    monkeypatch.setattr(kept, "read", lambda run: None)
    assert build.perform_all([run], tmp_path, full=True, jobs=1) == []
    assert "needs the package no_such_package" in capsys.readouterr().out
