"""What a run's metrics.csv says of its training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_toys.stats import paired_difference, written
from lightning_toys.training.metrics_csv import read_run, replica_columns


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Return moving averages over up to ``window`` steps back, along the last axis."""
    sums = np.cumsum(values, axis=1)
    out = sums.copy()
    out[:, window:] -= sums[:, :-window]
    return out / np.minimum(np.arange(1, values.shape[1] + 1), window)


def gain(rows: list[dict[str, str]], name: str, seeds: Sequence[int], first_step: int) -> str | None:
    """Say how a validation's metric has moved since ``first_step``, seed by seed.

    None where no validation came before that, or none after, or there is one seed: a difference needs its error.
    """
    steps, values = replica_columns(rows, f"eval/{name}", seeds)
    before = np.flatnonzero(steps <= first_step)
    if not len(before) or steps[-1] <= first_step:
        return None
    old, new = values[:, before[-1]], values[:, -1]
    paired = paired_difference(dict(enumerate(new.tolist())), dict(enumerate(old.tolist())))
    if paired is None:
        return None
    return f"{name} {old.mean():.4g} to {new.mean():.4g}, difference {written(paired.estimate)}, p {paired.p_value:.2g}"


def gains(folder: Path, seeds: Sequence[int], first_step: int) -> list[str]:
    """Say what the policy gradient has done to the validation's reward and entropy."""
    rows = read_run(folder)
    found = [gain(rows, name, seeds, first_step) for name in ("reward", "entropy")]
    return [line for line in found if line]
