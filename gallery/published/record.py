"""The 780 published values, by cell, metric and seed (README.md beside the file says where they are from)."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("toyexp_seedwise.csv")
MODES = ("regression", "flow", "straight_flow", "mip", "mip_one_step")
LOSSES, NETWORKS = ("l2", "l1"), ("concat", "film")
METRICS = {
    "reconstruction": ("l1", "l2"),
    "piecewise": ("l1", "l2", "subspace_diagonal", "subspace_off_diagonal", "boundary"),
    "rotation": ("l1", "l2", "cosine_mean", "cosine_min", "perpendicular_mean", "perpendicular_max"),
}


class Cell(NamedTuple):
    """What is trained: one network by one objective on one task."""

    task: str
    loss: str
    network: str
    mode: str


@cache
def record() -> Mapping[tuple[Cell, str], Mapping[int, float]]:
    """Return every published value: (cell, metric) to seed to value."""
    out: dict[tuple[Cell, str], dict[int, float]] = {}
    with FILE.open(newline="") as f:
        for row in csv.DictReader(f):
            key = Cell(row["task"], row["loss"], row["network"], row["mode"]), row["metric"]
            out.setdefault(key, {})[int(row["seed"])] = float(row["value"])
    return out


def published(cell: Cell, metric: str) -> Mapping[int, float]:
    """Return a metric's published values by seed.

    Raises:
        KeyError: nothing is published of this cell or metric.
    """
    return record()[cell, metric]


def cells(task: str) -> list[Cell]:
    """Return a task's twenty cells."""
    return [Cell(task, loss, network, mode) for loss in LOSSES for network in NETWORKS for mode in MODES]
