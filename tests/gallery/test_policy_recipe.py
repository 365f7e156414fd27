"""The policy's tables from many actions: signs, families, kept modes and cells, from made-up results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery import kept
from gallery.recipe import Folders, Run
from gallery.recipes import policy_actions as recipe
from gallery.recipes import policy_modes as modes
from tests.gallery.made_up import write_results
from tests.gallery.test_bandit_recipe import rows

THREE, EIGHT = -3.897, -2.907  # entropies of the targets
SHARED = np.random.default_rng(1).normal(0, 0.001, 4)  # of the seeds, which pairing takes out


def row(off5: float, entropy: float, key: int, tv: float = 0.01) -> dict[str, list[float]]:
    own = np.random.default_rng(key).normal(0, 0.0001, (5, 4))
    levels = {"tv": tv, "off3": 0.02 + off5, "off5": off5, "off10": off5 / 2, "entropy_knn": entropy}
    return {name: list(level + SHARED + x) for (name, level), x in zip(levels.items(), own, strict=True)}


def write_shares(folder: Path, found: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    content = {"seeds": [10, 11, 12, 13], "samples": 1000, "rows": found, "target": {"tv": 0.0004}}
    (folder / "shares.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("runs")
    folders = {run.name: root / run.folder for run in (*recipe.RECIPE.runs, *modes.RECIPE.runs)}

    def shares(run: Run, found: dict[str, dict[str, list[float]]]) -> None:
        write_shares(folders[run.name], found)

    shares(recipe.SHORT, {"1": row(0.03, THREE, 1), "1 raw": row(0.03, THREE, 2)})
    shares(recipe.SHORT_CONSTANT, {"1": row(0.93, THREE, 3), "1 raw": row(0.03, THREE, 4)})
    for k, (name, run) in enumerate(recipe.ABLATION.items()):
        shares(run, {"1": row(0.01 + 0.01 * k, THREE, 10 + k, 0.06 if name == "independent" else 0.01)})
    noise = row(0.004, THREE + 0.1, 22) | {"width": [0.01, 0.008, 0.008, 0.009]}
    shares(recipe.FRESH, {"1": row(0.003, THREE + 0.2, 20), "2": row(0.001, THREE, 21), "noise": noise})
    shares(recipe.DECONVOLVED, {"1": row(0.003, THREE - 0.05, 23)})
    eight = row(0.004, EIGHT + 0.1, 26) | {"width": [0.014] * 4}
    shares(recipe.FRESH_EIGHT, {"1": row(0.005, EIGHT, 24), "2": row(0.005, EIGHT, 25), "noise": eight})
    flow = {"euler-8": (0.02, 0.3), "log-8": (0.01, 0.1), "euler-16": (0.01, 0.2), "log-16": (0.01, 0.0)}
    shares(recipe.FRESH_FLOW, {name: row(o, THREE - gap, 30 + k) for k, (name, (o, gap)) in enumerate(flow.items())})
    for name, run in modes.BY_CLASS.items():
        write_results(folders[run.name], weights(name))
    for name, run in modes.PERMUTED.items():
        write_results(folders[run.name], chosen(name))
    return Folders(folders, full=True)


def content(**metrics: list[float]) -> str:
    found = {name: {"values": v} for name, v in metrics.items()}
    n = len(next(iter(metrics.values())))
    return json.dumps({"stage": "fit", "seeds": list(range(n)), "settings": {}, "metrics": found, "references": {}})


def weights(name: str) -> str:
    """Three seeds: all modes; the second too light; the first alone. The Gaussian's actions are off all of them."""
    w = {"weight_mode0": [0.39, 0.6, 1.0], "weight_mode1": [0.33, 0.16, 0.0], "weight_mode2": [0.28, 0.24, 0.0]}
    off = [1.0, 0.9, 0.8] if name == "gaussian_forward" else [0.0, 0.0, 0.001]
    return content(**w, tv=[0.0, 0.2, 0.6], off5=off, off10=off)


def chosen(name: str) -> str:
    """Of 64 seeds: in proportion to equal weights, and two thirds on the first mode whatever the others are."""
    counts = [22, 21, 21] if name == "equal" else [44, 10, 10]
    which = np.repeat(range(3), counts)
    one = {f"chose_mode{i}": list((which == i).astype(float)) for i in range(3)}
    w = {f"weight_mode{i}": one[f"chose_mode{i}"] for i in range(3)}
    return content(**one, **w, tv=[0.6] * 64, off5=[0.0] * 64, off10=[0.0] * 64)


def number(cell: str) -> float:
    return float(cell.split(" ± ")[0])


def test_short_runs(at: Folders) -> None:
    lines = [line.strip("| ").split(" | ") for line in recipe.short_table(at).splitlines()[2:]]
    assert [line[:2] for line in lines] == [
        ["warmed up", "averaged"],
        ["warmed up", "last step's"],
        ["constant", "averaged"],
        ["constant", "last step's"],
    ]
    assert [round(number(line[3]), 1) for line in lines] == [0.0, 0.0, 0.9, 0.0]  # off 5 sd
    assert number(recipe.averaged_minus_raw(recipe.SHORT_CONSTANT)(at)) == pytest.approx(0.9, abs=0.01)
    assert abs(number(recipe.averaged_minus_raw(recipe.SHORT)(at))) < 0.001


def test_the_ablation_is_one_family_of_six(at: Folders) -> None:
    found = rows(recipe.ablation_questions(at))
    assert len(found) == 6
    assert number(found["`--data.coupling Independent`: TV"][1]) == pytest.approx(0.05, abs=0.002)
    for k, words in enumerate(("--data.coupling Independent", "--model.form edm", "--model.tangent conditional"), 1):
        assert number(found[f"`{words}`: off 5 sd"][1]) == pytest.approx(0.01 * k, abs=0.001)
    assert abs(number(found["`--model.form edm`: TV"][1])) < 0.001
    assert float(recipe.tv_ratio(at).split(" ")[0]) == pytest.approx(6, abs=0.7)
    assert recipe.ablation_table(at).splitlines()[-1].startswith("| reference: as many of the target's own | 0.00040 |")


def test_fresh_seeds_and_noise_have_the_sign_of_a_minus_b(at: Folders) -> None:
    asked = rows(recipe.frozen_questions(at))
    wanted = {
        "three modes: SMFP's entropy minus the target's": 0.2,
        "eight Gaussians: SMFP's entropy minus the target's": 0.0,
        "flow, 8 steps: error of the entropy, logarithmic minus even": -0.2,
        "flow, 8 steps: off 5 sd, logarithmic minus even": -0.01,
        "off 5 sd: SMFP by one step minus flow by 8 logarithmic": -0.007,
    }
    assert len(asked) == 7
    for name, difference in wanted.items():
        assert number(asked[name][1]) == pytest.approx(difference, abs=0.002), name
    noise = rows(recipe.noise_questions(at))
    assert len(noise) == 4
    assert number(noise["`deconvolved` minus `head`: error of the entropy"][1]) == pytest.approx(-0.15, abs=0.01)
    table = recipe.noise_table(at)
    assert "| the same map, noise of the likeliest width | .008 to .010 |" in table
    assert "| eight Gaussians: noise of the likeliest width | .014 to .014 |" in table
    assert number(recipe.level(recipe.FRESH_EIGHT, "noise", "entropy_gap")(at)) == pytest.approx(0.1, abs=0.02)
    assert recipe.target_tv(at, recipe.FRESH) == 0.0004
    assert len(recipe.frozen_table(recipe.FROZEN)(at).splitlines()) == 2 + 6


def test_a_mode_is_kept_with_half_of_its_weight_and_no_mode_by_actions_that_are_off(at: Folders) -> None:
    lines = [line.strip("| ").split(" | ") for line in modes.classes_table(at).splitlines()[2:]]
    assert [line[3] for line in lines] == [
        "64 keep 1",
        "3 keep 0",
        "1 keep 1, 1 keep 2, 1 keep 3",
        "1 keep 1, 1 keep 2, 1 keep 3",
    ]


def test_kept_modes_in_words(at: Folders) -> None:
    assert modes.kept_in_words(at, "mixture_reverse") == "1, 1 and 1 of 3"


def test_seeds_on_the_same_mode(at: Folders) -> None:
    """44, 10, 10 and 22, 21, 21 in the seeds' order: 22 agree on the first, none on the second, 10 on the third."""
    assert modes.same_mode(at) == "32 of 64"


def test_counts_are_held_against_the_weights(at: Folders) -> None:
    """Pearson's statistic by hand for 44, 10, 10 with the weights turned; the least of three p-values is tripled."""
    lines = [line.strip("| ").split(" | ") for line in modes.weights_table(at).splitlines()[2:]]
    assert [line[0] for line in lines] == ["1.4 : 1.2 : 1", "1 : 1.2 : 1.4", "1 : 1 : 1"]
    expected = [64 * w / 3.6 for w in (1, 1.2, 1.4)]
    x2 = sum((n - e) ** 2 / e for n, e in zip((44, 10, 10), expected, strict=True))
    assert float(lines[1][-1]) == pytest.approx(3 * math.exp(-x2 / 2), rel=0.05)
    assert float(lines[2][-1]) > 0.9


def test_every_run_of_actions_is_measured_where_it_was_trained() -> None:
    """The second command reads the folder that the first one fills, and asks for the readouts that the tables read."""
    of = {**recipe.FROZEN, **recipe.EIGHT_FROZEN, **recipe.NOISES}
    assert of
    for run, readout in of.values():
        fit, measure = run.commands
        assert fit.startswith("fit ")
        assert measure.startswith("-m gallery.shares ")
        assert readout in measure.partition("--readouts ")[2].partition(" --")[0].split()


def test_policies_are_drawn_side_by_side_of_kept_runs(tmp_path: Path) -> None:
    """What is kept of a run has its samples and results, and no config.yaml."""
    places = {}
    for run in (recipe.FRESH, recipe.FRESH_FLOW):
        assert kept.unpack(run, tmp_path) is not None
        places[run.name] = tmp_path / run.folder
        assert not (places[run.name] / "config.yaml").exists()
    places[recipe.GAUSSIAN.name] = places[recipe.FRESH.name]  # another one's samples do here
    drawn = recipe.side_by_side(Folders(places, full=True))
    assert Path(drawn).read_bytes().startswith(b"\x89PNG")
