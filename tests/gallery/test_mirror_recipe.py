"""mirror_descent's learned score, with its Gaussian part and without: from made-up results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gallery.recipe import Folders
from gallery.recipes import mirror as recipe
from lightning_toys.mirror_descent.energy import EVALUATION_LEVELS
from tests.gallery.made_up import write_results


@pytest.fixture
def at(tmp_path: Path) -> Folders:
    """The score is three times as far off without M; draws with the learned energy are as near as exact ones."""
    for name, error in (("learned", 0.002), ("without_m", 0.006)):
        metrics: dict[str, Any] = {
            f"score_error@{abar:g}": {"values": [error * (1 + 0.1 * r) for r in range(4)]} for abar in EVALUATION_LEVELS
        }
        for sampler in recipe.SMOOTH:
            for label, kl in ((sampler, 0.0020), (sampler + "_exact", 0.0015)):
                metrics[f"joint_kl@{label}"] = {"values": [kl, kl, kl, kl + 0.001]}
            metrics[f"action_kl@{sampler}"] = {"values": [0.0, 0.0, 0.0, 0.001]}
            metrics[f"cond_ratio@{sampler}"] = {"values": [0.99, 1.0, 1.0, 1.01]}
        content = {"stage": "test", "seeds": [0, 1, 2, 3], "settings": {"model.chains": 1000}, "metrics": metrics}
        write_results(tmp_path / name, json.dumps(content))
    return Folders({name: tmp_path / name for name in ("learned", "without_m")}, full=True)


def test_the_score_with_m_and_without(at: Folders) -> None:
    rows = recipe.without_m_errors(at).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {abar:g}".replace(" 0.", " .") for abar in EVALUATION_LEVELS]
    assert all(row.split(" | ")[1:3] == [".0023", ".0069"] for row in rows), rows[0]
    assert all(row.split(" | ")[3].startswith("3.0 (3.0 to 3.0)") for row in rows), rows[0]


def test_samplers_are_written_from_values(at: Folders) -> None:
    """As ``test`` writes them: with limits, from what is kept of a run."""
    for made in (recipe.learned_table(at), recipe.without_m_samplers(at)):
        rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in made.splitlines()[2:]]
        assert [row[0] for row in rows] == list(recipe.SMOOTH)
        assert all(row[3].startswith("0.0005") for row in rows), rows[0]
        assert all(row[4] == "0.00025 [0, 0.00105]" for row in rows), rows[0]
