"""update_entropy's tables: signs, plans, errors and coverage from made-up runs of known numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery.recipe import Folders
from gallery.recipes import entropy as recipe
from tests.gallery.made_up import write_results

SEEDS, ETAS = range(5), ("0.0001", "0.0003", "0.001", "0.003", "0.01")


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(k for row in rows for k in row))
    with (folder / "metrics.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(rows)


def trained(folder: Path, fall: float) -> None:
    """A run whose entropy falls by ``fall`` and a seed's own hundredth of it, in steps 400 to 480."""
    settings = {"model.warm_steps": 400, "model.lr": 0.001}
    write_results(folder, json.dumps({"stage": "fit", "settings": settings, "seeds": list(SEEDS), "metrics": {}}))
    rows = []
    for step, done in ((400, 0.0), (480, 1.0)):
        row: dict[str, Any] = {"step": step}
        for metric, change in (("reward", 0.1), ("entropy", -fall)):
            row[f"eval/{metric}"] = 0.5
            row |= {f"replicas/eval/{metric}/seed_{s}": 0.5 + done * change * (1 + s / 100) for s in SEEDS}
        rows.append(row)
    write_metrics(folder, rows)


def write_probe(folder: Path, plan: dict[str, Any], seed: int, **content: Any) -> Path:
    inside = folder / f"seed_{seed}"
    inside.mkdir(parents=True)
    slopes = {n: {"value": v, "se": 3.0, "update_se": 4.0} for n, v in content.pop("slopes").items()}
    moved = {"value": 0.002, "se": 0.001}
    evaluation = {"slopes": slopes, "prompts": 256, "curvature": {"value": 500.0, "se": 9.0},
                  "changes": {"full": dict.fromkeys(ETAS, moved)}}  # fmt: skip
    plan = {"controls": 0, "prompts": 4, "filter_zero_advantage": True, "eval_batches": 1} | plan
    whole = {"seed": seed, "plan": plan, "evaluations": [evaluation], **content}
    (inside / "summary.json").write_text(json.dumps(whole))
    return inside


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("runs")
    folders = {run.name: root / run.folder for run in recipe.RECIPE.runs}
    for name, fall in (("arithmetic", 0.02), ("permuted", 0.005)):
        trained(folders[name], fall)
    place = folders["arithmetic"]
    for seed in SEEDS:
        changes = {"step": 0.03, "reversed": 0.04, "random_0": 0.01, "random_1": 0.02}
        found = {n: {eta: {"value": v + seed / 1000} for eta in ("0.001", "0.01")} for n, v in changes.items()}
        both = {"slopes": {"full": 20.0, "momentum": 1.0, "grad": 19.0}}
        write_probe(place / "probe-1", {"controls": 4}, seed, controls={"changes": found}, **both)
        whole = {"slopes": {"full": (14.0, 10.6, 10.7, -10.6, 0.0)[seed], "momentum": 1.0, "grad": 13.0}}
        write_probe(place / "probe-2", {"prompts": 16, "filter_zero_advantage": False}, seed, **whole)
        inside = write_probe(place / "probe", {"eval_batches": 2}, seed, **both)
        x = np.array([1.0, 2.0, 3.0, -4.0])
        np.save(inside / "eval_00_first_order_matrix.npy", np.stack([x, 0 * x]))
        for k, factor in ((0, 1.0), (1, 0.5)):
            (inside / f"eval_{k:02d}_grad_eta").mkdir()
            for eta in ETAS:
                np.save(inside / f"eval_{k:02d}_grad_eta" / f"eta_{eta}.npy", np.stack([factor * float(eta) * x] * 1))
    watched = folders["watched"]
    watched.mkdir(parents=True)
    rows = []
    for step in range(80):  # off by four of both errors, 2.5 of three clusters' intervals are wider
        row = {"step": step, "entropy_step/measured": 1}
        off = 0.0 if step % 2 else 0.02
        numbers = {"predicted": -0.001, "second_order": 0.0, "measured": off, "momentum": -0.0004, "decay": 0.0,
                   "batch": -0.0006, "clusters": 64.0, **{f"{n}_se": 0.003 for n in ("predicted", "second_order")},
                   "measured_se": 0.004}  # fmt: skip
        row |= {f"replicas/entropy_step/{n}/seed_{s}": v for n, v in numbers.items() for s in SEEDS}
        rows.append(row)
    write_metrics(watched, rows)
    said = "UpdateEntropyCallback: 80 measurements of 1.50 s, 55% of the training's 200 s"
    (watched / "train.log").write_text(said)
    return Folders(folders, full=True)


def rows(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    return {line[0]: line[1:] for line in lines}


def test_the_control_is_taken_from_the_training(at: Folders) -> None:
    found = rows(recipe.permuted_table(at))
    assert list(found) == [
        "advantages as they are", "permuted within their groups", "difference, paired by seed (p adjusted)",
    ]  # fmt: skip
    falls = [cells[1] for cells in found.values()]
    assert falls[0].startswith("-.0204 ±")  # 1.02 is the mean seed's
    assert falls[1].startswith("-.0051 ±")
    assert falls[2].startswith("-.0153 ±")
    assert falls[2].endswith("(p < .001)")


def test_a_step_beside_its_controls(at: Folders) -> None:
    found = rows(recipe.controls_table(at))
    means = {name: cells[1].split(" ±")[0] for name, cells in found.items()}
    assert means == {
        "the step": ".03200", "the step reversed": ".04200", "random signs, mean of 4 directions": ".01700",
        "the step less the random directions": ".01500",
    }  # fmt: skip


def test_which_slopes_differ_from_zero(at: Folders) -> None:
    """Both errors are 5 together; the prompts of U decide how many of them are wanted: t(3) 3.18, t(15) 2.13."""
    number = {e.name: e.make for e in recipe.RECIPE.numbers}
    assert recipe.distinct(recipe.probes(at)) == "5 of 5"  # 20 > 15.9
    assert recipe.distinct(recipe.whole_batch(at)) == "2 of 5"  # 14 and 10.7 > 10.66
    assert len(recipe.batch_table(at).splitlines()) == 7
    make: Any = number["entropy.chord"]
    assert make(at).startswith("-.25 ±")  # .0204 over 80 steps of .001: .255 and a rounding less
    make = number["entropy.momentum"]
    assert make(at) == ", ".join(["1.00 ± 5.00"] * 5)


def test_shares_on_other_draws(at: Folders) -> None:
    assert list(recipe.agreement(at, 0.001, 0))[2] == pytest.approx(
        {"correlation": 1, "rank": 1, "slope": 1, "error": 0}, abs=1e-12
    )
    assert list(recipe.agreement(at, 0.001, 1))[2] == pytest.approx(
        {"correlation": 1, "rank": 1, "slope": 0.5, "error": 1}, abs=1e-12
    )
    assert "| .0003 | another E | 1.00 to 1.00 | 1.00 to 1.00 | .50 to .50 | 1.00 to 1.00 |" in recipe.halves_table(at)


def test_watched_steps(at: Folders) -> None:
    number: dict[str, Any] = {e.name: e.make for e in recipe.RECIPE.numbers}
    assert number["watched.predicted"](at).startswith("-.0800")
    assert number["watched.curvature"](at).startswith(".0800")
    assert number["watched.measured"](at).startswith(".8000")
    assert number["watched.missed"](at).startswith("-.8000")
    assert number["watched.given_back.predicted"](at) == "1.00 ± .00"  # .08 of .08
    assert number["watched.given_back.batch"](at) == "1.67 ± .00"  # .08 of .048
    assert number["watched.inside.second"](at) == "50 ± 0 %"  # .02 is four of both errors
    assert number["watched.inside.first"](at) == "50 ± 0 %"
    assert number["watched.inside.seeds"](at) == ".50 to .50"
    assert number["watched.looks"](at) == "55 %"
    found = rows(recipe.parts_table(at))
    assert found["their sum, first order"][0].startswith("-.0800")
    assert found["momentum"][0].startswith("-.0320")
    assert found["batch"][0].startswith("-.0480")
