"""The course of a training, read from metrics.csv."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_toys.update_entropy.history import moving_average, validation_changes

SEEDS = [3, 5, 8]
BEFORE, AFTER = np.array([0.5, 0.7, 0.6]), np.array([0.65, 0.75, 0.8])


def write(folder: Path, rows: list[tuple[int, np.ndarray]]) -> None:
    names = [f"replicas/eval/reward/seed_{s}" for s in SEEDS]
    with (folder / "metrics.csv").open("w", newline="") as f:
        w = csv.writer(f)
        w.writerow(["step", "train/loss", *names])
        for step, values in rows:
            w.writerow([step, 1.0, *[""] * len(names)])
            w.writerow([step, "", *values])


def test_changes_are_paired_by_seed_and_start_where_the_policy_gradient_does(tmp_path: Path) -> None:
    write(tmp_path, [(10, 0 * BEFORE), (20, BEFORE), (30, BEFORE + 5), (40, AFTER)])
    (line,) = validation_changes(tmp_path, SEEDS, first_step=20)
    d = AFTER - BEFORE
    half = stats.t.ppf(0.975, 2) * d.std(ddof=1) / np.sqrt(3)
    assert line == (
        f"reward 0.6 to 0.7333, difference {d.mean():.2f} ± {half:.2f}, p {stats.ttest_rel(AFTER, BEFORE).pvalue:.2g}"
    )


@pytest.mark.parametrize("steps", [(30, 40), (10, 20)], ids=["none before", "none after"])
def test_no_change_without_both_ends(tmp_path: Path, steps: tuple[int, int]) -> None:
    write(tmp_path, [(steps[0], BEFORE), (steps[1], AFTER)])
    assert validation_changes(tmp_path, SEEDS, first_step=20 if steps[1] == 20 else 25) == []


def test_no_change_of_one_seed_and_of_no_file(tmp_path: Path) -> None:
    assert validation_changes(tmp_path, SEEDS, 20) == []
    write(tmp_path, [(20, BEFORE), (40, AFTER)])
    assert validation_changes(tmp_path, [3], 20) == []


def test_moving_averages() -> None:
    x = np.arange(6.0)[None]
    assert moving_average(x, 3)[0] == pytest.approx([0, 0.5, 1, 2, 3, 4])
