"""The course of a training, read from a run's metrics.csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_toys.stats import format_estimate, paired_difference
from lightning_toys.training.metrics_reader import read_run, replica_columns


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Return averages over the last ``window`` steps, fewer at the beginning, of values (R, steps).

    >>> moving_average(np.array([[1.0, 3.0, 5.0]]), 2)
    array([[1., 2., 4.]])
    """
    sums = np.cumsum(values, axis=1)
    out = sums.copy()
    out[:, window:] -= sums[:, :-window]
    return out / np.minimum(np.arange(1, values.shape[1] + 1), window)


def validation_change(rows: list[dict[str, str]], name: str, seeds: Sequence[int], first_step: int) -> str | None:
    """Return a line on the change of a validation's metric since ``first_step``, paired by seed.

    None where no validation came before that, or none after, or there is one seed: a difference needs its error.

    Args:
        rows: of metrics.csv.
        name: of the metric.
        seeds: of the replicas.
        first_step: the last validation up to this step is compared with the last of all.
    """
    steps, values = replica_columns(rows, f"eval/{name}", seeds)
    before = np.flatnonzero(steps <= first_step)
    if not len(before) or steps[-1] <= first_step:
        return None
    old, new = values[:, before[-1]], values[:, -1]
    paired = paired_difference(dict(enumerate(new.tolist())), dict(enumerate(old.tolist())))
    if paired is None:
        return None
    difference = format_estimate(paired.estimate)
    return f"{name} {old.mean():.4g} to {new.mean():.4g}, difference {difference}, p {paired.p_value:.2g}"


def validation_changes(folder: Path, seeds: Sequence[int], first_step: int) -> list[str]:
    """Return lines on the change of the validation's reward and entropy since ``first_step``, of a run's folder."""
    rows = read_run(folder)
    lines = [validation_change(rows, name, seeds, first_step) for name in ("reward", "entropy")]
    return [line for line in lines if line]
