"""The table of dampings: means over validations by seed, and a cell that went non-finite on its way."""

from __future__ import annotations

import json
from pathlib import Path

from gallery.recipe import Folders
from gallery.recipes import lagged as recipe
from tests.gallery.made_up import write_results

SEEDS = list(range(10, 26))


def write_curve(folder: Path, steps: range, level: float) -> None:
    """Seeds differ by .01 each; what is before the first validation that counts is far off."""
    heads = ["step", "eval/wrong_side", *(f"replicas/eval/wrong_side/seed_{s}" for s in SEEDS)]
    lines = [",".join(heads)]
    for k in steps:
        each = [level + 0.01 * i if k >= recipe.SINCE else 1.0 for i in range(len(SEEDS))]
        lines.append(",".join(map(str, [k, sum(each) / len(each), *each])))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_dampings_are_rows(tmp_path: Path) -> None:
    for k, c in enumerate(recipe.DAMPINGS):
        folder = tmp_path / f"lag_damping={c}"
        if k:
            content = {
                "stage": "fit",
                "seeds": SEEDS,
                "settings": {},
                "metrics": {"return": {"values": [100.0 * k] * 16}},
            }
            write_results(folder, json.dumps(content))
        write_curve(folder, range(1000, 30_001 if k else 9001, 1000), 0.4 - 0.1 * k)
    lines = recipe.lagged_table(Folders({recipe.LAGGED.name: tmp_path}, full=True)).split("\n")[2:]
    assert lines[0] == "| 0.0 | non-finite after 9000 | .48 (.40 to .55) |  |"
    assert lines[3] == "| 1.0 | 30000 | .17 (.10 to .25) | 300 [300, 300] |"
