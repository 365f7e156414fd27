"""The five claims on made-up seeds, and the recipe's tables on made-up run folders."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from gallery import kept
from gallery.published.claims import (
    CLAIMS,
    COMPARED,
    GEOMETRY,
    MENDS,
    Claim,
    Pair,
    Source,
    averaged,
    compare,
    published_ratio,
)
from gallery.published.record import METRICS, MODES, Cell, cells, published
from gallery.recipe import Entry, Folders
from gallery.recipes import published as recipe
from gallery.verdicts import claim_verdict, claim_verdicts, welch_ratio
from lightning_toys.flow_vs_regression.objectives import make_objective

Error = Callable[[Cell, str, Collection[str]], float]


def made_up(error: Error) -> Source:
    """Seeds that scatter by a few per cent around an error; cells scatter apart."""

    def source(cell: Cell, metric: str, mended: Collection[str]) -> dict[int, float]:
        k = sum(map(ord, "".join(cell) + metric))
        return {s: error(cell, metric, mended) * math.exp(0.03 * math.sin(k + 2.3 * s)) for s in range(3)}

    return source


def verdict(claim: Claim, error: Error) -> str:
    found = [compare(pair, made_up(error)) for pair in claim.pairs]
    return claim_verdict(claim_verdicts(found, claim.ties_hold), [c.causes for c in found])


GEOMETRIC, RECONSTRUCTION, BEST, LOSS, TIME = CLAIMS


def by_mode(factor: dict[str, float]) -> Error:
    return lambda cell, metric, mended: factor.get(cell.mode, 1.0)


def test_flows_and_regression_on_geometry() -> None:
    assert verdict(GEOMETRIC, by_mode({"regression": 4.0})) == "holds"
    assert verdict(GEOMETRIC, by_mode({"regression": 0.25})) == "reversed"
    assert verdict(GEOMETRIC, by_mode({})) == "cannot tell"
    assert verdict(GEOMETRIC, by_mode({"regression": 4.0, "flow": 16.0})) == "reversed"  # it is not true of all

    def started_off(cell: Cell, metric: str, mended: Collection[str]) -> float:
        return 20.0 if cell.mode == "regression" and "x0" not in mended else 1.0

    assert verdict(GEOMETRIC, started_off) == "artefact of the Gaussian x0"

    def unseen(cell: Cell, metric: str, mended: Collection[str]) -> float:
        worst = {"regression": 4.0}.get(cell.mode, 1.0)
        return 1.0 if (cell.network, metric) == ("film", "boundary") else worst

    assert verdict(GEOMETRIC, unseen) == "cannot tell"


def test_regression_at_reconstruction() -> None:
    assert verdict(RECONSTRUCTION, by_mode({"regression": 0.3})) == "holds"
    assert verdict(RECONSTRUCTION, by_mode({"regression": 0.3, "mip_one_step": 0.1})) == "reversed"

    def one_step(cell: Cell, metric: str, mended: Collection[str]) -> float:
        slow = 10.0 if cell.mode == "flow" and "steps" not in mended else 1.0
        return slow * (0.3 if cell.mode in ("straight_flow", "mip", "mip_one_step") else 1.0)

    assert verdict(RECONSTRUCTION, one_step) == "reversed"


def test_the_best_cell() -> None:
    best = Cell("", "l1", "film", "straight_flow")
    assert verdict(BEST, lambda cell, metric, mended: 0.2 if cell[1:] == best[1:] else 1.0) == "holds"
    other = ("l2", "film", "straight_flow")
    assert verdict(BEST, lambda c, m, _: 0.2 if c[1:] in (best[1:], other) else 1.0) == "cannot tell"
    assert verdict(BEST, lambda c, m, _: 0.05 if c[1:] == other else 0.2 if c[1:] == best[1:] else 1.0) == "reversed"


def test_l1_and_time() -> None:
    assert verdict(LOSS, lambda cell, metric, mended: 3.0 if cell.loss == "l1" else 1.0) == "holds"
    assert verdict(LOSS, lambda cell, metric, mended: 0.3 if cell.loss == "l1" else 1.0) == "reversed"
    assert verdict(TIME, by_mode({})) == "holds"  # a tie: not needed
    assert verdict(TIME, by_mode({"straight_flow": 3.0})) == "reversed"

    def single(cell: Cell, metric: str, mended: Collection[str]) -> float:
        return {"flow": 1.0 if "steps" in mended else 16.0, "straight_flow": 4.0}.get(cell.mode, 1.0)

    assert verdict(TIME, single) == "artefact of a single Euler step"


def test_comparisons_are_what_the_claims_say() -> None:
    assert [len(claim.pairs) for claim in CLAIMS] == [3 * 2 * 4, 2 * 4, 2 * 19, 3 * 2 * 2, 3 * 2 * 2]
    assert [claim.ties_hold for claim in CLAIMS] == [False, False, False, False, True]
    assert all(c.mode == "regression" for pair in GEOMETRIC.pairs for c in pair.b)
    assert all(c.mode == "regression" for pair in RECONSTRUCTION.pairs for c in pair.a)
    assert {(c.loss, c.network, c.mode) for pair in BEST.pairs for c in pair.a} == {("l1", "film", "straight_flow")}
    assert all(c.loss == "l2" for pair in LOSS.pairs for c in pair.a)
    assert all(c.mode in ("straight_flow", "mip_one_step") for pair in TIME.pairs for c in pair.a)
    assert sum(not pair.is_published for pair in TIME.pairs) == 6
    # both sides of a pair are of one task, and of metrics that it has
    for pair in (p for claim in CLAIMS for p in claim.pairs):
        (task,) = {c.task for c in (*pair.a, *pair.b)}
        assert pair.metric in METRICS[task]
    assert len(COMPARED) == 11
    assert not any(metric.startswith("cosine") for _, metric in COMPARED)
    assert all(metric in METRICS[task] for task, metric in GEOMETRY)


def test_losses_are_averaged_seed_by_seed() -> None:
    assert averaged([{0: 1.0, 1: 4.0, 2: 5.0}, {0: 9.0, 1: 16.0}]) == pytest.approx({0: 3.0, 1: 8.0})
    pair = GEOMETRIC.pairs[0]
    found = published_ratio(pair, lambda cell, metric, mended: published(cell, metric))
    assert found is not None
    a, b = (
        [math.prod(published(c, pair.metric)[s] for c in side) ** 0.5 for s in range(3)] for side in (pair.a, pair.b)
    )
    assert found.log == pytest.approx(welch_ratio(a, b).log)


def test_each_flaw_is_mended_alone_too() -> None:
    cell = Cell("piecewise", "l2", "concat", "regression")
    pair = Pair("", "boundary", (cell,), (cell._replace(mode="flow"),))
    factor = {"x0": 2.0, "truth": 3.0, "steps": 5.0, "weights": 7.0}

    def error(c: Cell, metric: str, mended: Collection[str]) -> float:
        return math.prod(factor[m] for m in mended) if c.mode == "regression" else 1.0

    found = compare(pair, made_up(error))
    assert {k: math.exp(v) for k, v in found.alone.items()} == pytest.approx(
        {words: factor[name] for name, words in MENDS.items()}
    )
    assert math.exp(found.change.log) == pytest.approx(210)
    assert found.mended.log - found.plain.log == pytest.approx(found.change.log)


# the recipe


def names_of(cell: Cell) -> list[str]:
    """Return the names of the metrics that `test` writes of a cell."""
    own = {
        "reconstruction": [],
        "piecewise": [
            "off_subspace",
            "boundary",
            "subspace_diagonal",
            "subspace_off_diagonal",
            *(f"published_{n}" for n in METRICS["piecewise"][2:]),
        ],
        "rotation": [
            *("cosine", "cosine_min", "perpendicular", "perpendicular_max"),
            *(f"published_{n}" for n in ("cosine_mean", "cosine_min")),
        ],
    }[cell.task]
    readouts = make_objective(cell.mode, 0.9, "published").readouts(["euler"], [1, 9])  # type: ignore[arg-type]
    return [f"{m}@{x0}/{r.name}" for m in ("l1", "l2", *own) for x0 in ("zeros", "gaussian") for r in readouts]


def write(folder: Path, cell: Cell, weights: str, k: int, factor: float, steps: str = "[1, 9]") -> None:
    metrics = {
        name: {"values": [factor * (1 + 0.01 * s + 0.001 * i) for s in range(3)]}
        for i, name in enumerate(names_of(cell))
    }
    if steps != "[1, 9]":
        rows = [f"{m}@{x0}" for m, x0 in (("l2", "zeros"), ("l2", "gaussian"), ("spread", "gaussian"))]
        solvers = [f"euler-{n}" for n in (1, 2, 4, 9)] + ["dopri5"]
        metrics = {f"{row}/{s}": {"values": [7.0, 7.1, 7.2]} for row in rows for s in solvers}
    plain = {name.split("@")[0] for name in names_of(cell)}
    references = {
        n: dict.fromkeys(plain, 0.5) for n in ("zero", "nearest", "linear", "cubic_spline", "gaussian_process")
    }
    content = {
        "stage": "test",
        "seeds": [0, 1, 2],
        "settings": {"model.evaluation.weights": weights, "model.evaluation.test_nfe": steps},
        "metrics": metrics,
        "references": references,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("results.json" if k == 0 else f"results-{k}.json")).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Run folders in which our seeds are made up."""
    root = tmp_path_factory.mktemp("runs")
    (root / "stamps").mkdir()
    folders = {run.name: root / run.folder for run in recipe.RECIPE.runs}
    for task in METRICS:
        for mode in MODES:
            (root / f"stamps/published_{task}_{mode}.json").write_text(json.dumps({"seconds": 3600}))
        for cell in cells(task):
            folder = folders[f"published_{task}_{cell.mode}"]
            write(folder / recipe.name_of(cell), cell, "raw", 0, 1.0)
            write(folder / recipe.name_of(cell), cell, "ema", 1, 2.0)
            if (cell.task, cell.loss, cell.mode) == ("reconstruction", "l2", "flow"):
                write(folder / recipe.name_of(cell), cell, "raw", 2, 1.0, "[1, 2, 4, 9]")
    return Folders(folders, full=True)


@pytest.mark.parametrize("entry", [*recipe.RECIPE.tables, *recipe.RECIPE.numbers], ids=lambda e: e.name)
def test_every_table_and_number_is_made(entry: Entry, at: Folders) -> None:
    assert callable(entry.make)
    text = entry.make(at)
    assert text
    assert "nan" not in text
    if text.startswith("|"):
        columns = {line.count("|") for line in text.split("\n")}
        assert len(columns) == 1


def test_tables_have_every_cell_and_metric(at: Folders) -> None:
    for task in METRICS:
        assert len(recipe.level_table(at, task).split("\n")) == 2 + 20
    assert len(recipe.count_table(at).split("\n")) == 2 + 11
    assert sum(int(recipe.cells_of(at, word)) for word in recipe.WORDS) == 11 * 20
    for line in recipe.count_table(at).split("\n")[2:]:
        assert sum(map(int, re.findall(r"\| (\d+) (?=\|)", line))) == 20
    assert ".438 .513 .431" in recipe.level_table(at, "piecewise")
    assert ".438 .513 .431" in recipe.boundary_table(at)


def test_the_picture_is_drawn(at: Folders) -> None:
    assert Path(recipe.drawing(at)).read_bytes().startswith(b"\x89PNG")


REGRESSION, FLOW = recipe.REGRESSION, Cell("piecewise", "l2", "concat", "flow")
ROTATION = Cell("rotation", "l2", "concat", "flow")


@pytest.mark.parametrize(
    ("cell", "metric", "mended", "name"),
    [
        (REGRESSION, "l2", (), "l2@zeros/direct"),
        (REGRESSION, "boundary", (), "published_boundary@gaussian/direct"),
        (REGRESSION, "boundary", ("x0",), "published_boundary@zeros/direct"),
        (REGRESSION, "boundary", ("truth",), "published_boundary@gaussian/direct"),
        (REGRESSION, "subspace_diagonal", (), "published_subspace_diagonal@gaussian/direct"),
        (REGRESSION, "subspace_diagonal", ("truth",), "subspace_diagonal@gaussian/direct"),
        (REGRESSION, "subspace_off_diagonal", ("x0",), "published_subspace_off_diagonal@zeros/direct"),
        (FLOW, "subspace_diagonal", tuple(MENDS), "subspace_diagonal@zeros/euler-9"),
        (FLOW, "boundary", ("steps",), "published_boundary@gaussian/euler-9"),
        (ROTATION, "perpendicular_mean", ("weights",), "perpendicular@zeros/euler-1"),
        (ROTATION, "perpendicular_max", (), "perpendicular_max@zeros/euler-1"),
        (ROTATION, "cosine_mean", (), "published_cosine_mean@zeros/euler-1"),
        (ROTATION._replace(mode="mip"), "l1", (), "l1@zeros/two-step"),
        (ROTATION._replace(mode="mip"), "l1#one-step", (), "l1@zeros/one-step"),
        (ROTATION._replace(mode="mip_one_step"), "l1", ("steps",), "l1@zeros/one-step"),
    ],
)
def test_where_the_published_metrics_are(cell: Cell, metric: str, mended: tuple[str, ...], name: str) -> None:
    assert recipe.metric_name(cell, metric, mended) == name
    assert name in names_of(cell)


def test_weights_are_those_asked_for(at: Folders) -> None:
    raw, ema = (recipe.ours(at, REGRESSION, "l2", mended) for mended in ((), ("weights",)))
    assert ema[0] == pytest.approx(2 * raw[0])
    assert "7.1" in recipe.start_table(at)
    # the start table's tests are not mistaken for the cells' own
    assert recipe.ours(at, Cell("reconstruction", "l2", "film", "flow"), "l2")[0] < 2


def test_fifteen_sweeps_train_all_sixty_cells() -> None:
    sweeps = {run.name: run.commands[0] for run in recipe.RECIPE.runs}
    assert len(sweeps) == 15
    for task, mode in itertools.product(METRICS, MODES):
        found = sweeps[f"published_{task}_{mode}"]
        for words in (f"flow_vs_regression/published_{task}.yaml", f"[{mode}]", "[concat,film]", "[l1,l2]"):
            assert words in found
    assert [len({recipe.name_of(c) for c in cells(task)}) for task in METRICS] == [20, 20, 20]


def test_every_table_is_the_same_from_what_is_kept(at: Folders, tmp_path: Path) -> None:
    """Trained on one machine and kept, the tables are made on another, task by task."""
    root = next(iter(at.values())).parents[1]
    for run in recipe.RECIPE.runs:
        stamp = {"identity": {"commands": list(run.commands)}, "seconds": 3600}
        kept.keep(run, root, stamp, tmp_path / "kept")
        assert kept.unpack(run, tmp_path / "runs", tmp_path / "kept") == stamp
        other = dataclasses.replace(run, commands=("fit",))
        assert kept.read(other, tmp_path / "kept") is None, "of another command"
    again = Folders({run.name: tmp_path / "runs" / run.folder for run in recipe.RECIPE.runs}, full=True)
    made = [(e.name, e.make) for e in (*recipe.RECIPE.tables, *recipe.RECIPE.numbers) if callable(e.make)]
    assert len(made) > 10
    for name, make in made:
        assert make(again) == make(at), name
