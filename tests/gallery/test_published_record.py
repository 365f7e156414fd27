"""The published record: 780 values, the digits that were printed, and population deviations in the report's tables."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from gallery.published.record import FILE, LOSSES, METRICS, MODES, NETWORKS, Cell, cells, published, record


def test_the_record_is_whole() -> None:
    with FILE.open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 780
    wanted = {
        (Cell(task, loss, network, mode), metric)
        for task, metrics in METRICS.items()
        for metric in metrics
        for loss in LOSSES
        for network in NETWORKS
        for mode in MODES
    }
    assert len(wanted) == 260
    assert set(record()) == wanted
    assert all(set(seeds) == {0, 1, 2} for seeds in record().values())
    keys = [tuple(row[k] for k in ("task", "loss", "network", "mode", "seed", "metric")) for row in rows]
    assert len(set(keys)) == 780


# digits as the report prints them, by cell, metric and seed
@pytest.mark.parametrize(
    ("cell", "metric", "wanted"),
    [
        (("piecewise", "l2", "concat", "regression"), "boundary", [0.437604, 0.513411, 0.431160]),
        (("piecewise", "l1", "film", "straight_flow"), "boundary", [0.008506, 0.012071, 0.008731]),
        (("piecewise", "l2", "concat", "flow"), "subspace_off_diagonal", [0.781539, 0.782324, 0.781843]),
        (("reconstruction", "l2", "film", "mip_one_step"), "l2", [0.003936, 0.002885, 0.002769]),
        (("reconstruction", "l2", "film", "regression"), "l2", [0.018494, 0.002805, 0.002886]),
        (("reconstruction", "l1", "concat", "mip"), "l1", [0.003863, 0.004465, 0.004226]),
        (("rotation", "l1", "film", "straight_flow"), "perpendicular_mean", [0.062953, 0.062925, 0.064957]),
    ],
)
def test_printed_digits(cell: tuple[str, str, str, str], metric: str, wanted: list[float]) -> None:
    assert list(published(Cell(*cell), metric).values()) == wanted


# mean and deviation as the report's averaged tables print them
@pytest.mark.parametrize(
    ("cell", "metric", "mean", "sd"),
    [
        (("reconstruction", "l2", "concat", "straight_flow"), "l2", 0.005065, 0.001444),
        (("reconstruction", "l2", "film", "regression"), "l2", 0.008062, 0.007377),
        (("reconstruction", "l2", "concat", "regression"), "l2", 0.003314, 0.000091),
        (("reconstruction", "l2", "film", "mip_one_step"), "l2", 0.003197, 0.000525),
        (("piecewise", "l2", "concat", "regression"), "boundary", 0.460725, 0.037347),
        (("piecewise", "l1", "film", "straight_flow"), "boundary", 0.009769, 0.001630),
    ],
)
def test_printed_deviations_are_population_ones(
    cell: tuple[str, str, str, str], metric: str, mean: float, sd: float
) -> None:
    seeds = np.array(list(published(Cell(*cell), metric).values()))
    assert seeds.mean() == pytest.approx(mean, abs=1e-6)
    assert seeds.std(ddof=0) == pytest.approx(sd, abs=1e-6)
    assert seeds.std(ddof=1) > 1.2 * sd  # what the sample's deviation would be: sqrt(3 / 2) times as large


def test_a_number_that_nobody_published() -> None:
    """.401 once passed for the published boundary of regression."""
    assert not any(abs(v - 0.401) < 5e-4 for seeds in record().values() for v in seeds.values())
    with pytest.raises(KeyError):
        published(Cell("piecewise", "l2", "concat", "regression"), "perpendicular_mean")


def test_cells_of_a_task() -> None:
    assert len(cells("rotation")) == len(set(cells("rotation"))) == 20
    assert {c.task for c in cells("rotation")} == {"rotation"}


@pytest.mark.parametrize(
    ("task", "metric", "loss"), [("piecewise", "boundary", "l1"), ("rotation", "perpendicular_mean", "l2")]
)
def test_the_best_cells_of_its_own_table(task: str, metric: str, loss: str) -> None:
    """The report calls straight_flow, FiLM, L1 the best in both; in perpendicular its L2 (.063084) is below L1."""
    mean = {c: float(np.mean(list(published(c, metric).values()))) for c in cells(task)}
    assert min(mean, key=lambda c: mean[c]) == Cell(task, loss, "film", "straight_flow")
