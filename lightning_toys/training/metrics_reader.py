"""metrics.csv read back; imports neither torch nor Lightning."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_toys.errors import ToyError
from lightning_toys.training.files import read_text

MOST_BYTES = 2**30
LAST_STEP = 2**63


def check_row(row: dict[str, str]) -> None:
    """Refuse a row that holds something else than numbers, or a step that nobody takes."""
    if not -LAST_STEP < int(row["step"]) < LAST_STEP:
        raise ValueError(f"{row['step'][:20]!r} is no step")
    [float(v) for v in row.values() if v]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a metrics.csv; a last line that was cut off is left out.

    Raises:
        ToyError: the file holds anything but numbers by step.
    """
    try:
        text = read_text(path, MOST_BYTES)
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        rows = [row for row in reader if None not in row.values() and row["step"]]
        for row in rows:
            check_row(row)
    except (ValueError, KeyError, TypeError, csv.Error, OSError) as error:
        why = "no column step" if isinstance(error, KeyError) else " ".join(str(error).split())[:120]
        raise ToyError(f"{path} is not a metrics.csv of lightning_toys ({why})") from None
    return rows


def read_run(folder: Path) -> list[dict[str, str]]:
    """Read the rows of a run's metrics.csv, none if it is not there."""
    path = folder / "metrics.csv"
    return read_csv(path) if path.exists() else []


def replica_columns(rows: list[dict[str, str]], name: str, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps (n,) at which a metric was logged, and its value by replica (R, n)."""
    columns = [f"replicas/{name}/seed_{s}" for s in seeds] if len(seeds) > 1 else [name]
    found = [r for r in rows if all(r.get(c) for c in columns)]
    values = np.array([[float(r[c]) for r in found] for c in columns])
    return np.array([float(r["step"]) for r in found]), values.reshape(len(columns), len(found))
