"""The table of dampings: cells by their name, medians, and a cell that went non-finite."""

from __future__ import annotations

import json
from pathlib import Path

from gallery.recipe import Folders
from gallery.recipes import lagged as recipe
from tests.gallery.made_up import write_results


def test_dampings_are_rows(tmp_path: Path) -> None:
    for k, c in enumerate(recipe.DAMPINGS[1:]):
        found = {"return": [100.0 * k] * 4, "wrong_side": [0.1, 0.2, 0.3, 0.9], "td_error": [1.0, 2.0, 4.0, 8.0]}
        metrics = {name: {"values": v} for name, v in found.items() if (c, name) != ("1.0", "wrong_side")}
        content = {"stage": "fit", "seeds": [10, 11, 12, 13], "settings": {}, "metrics": metrics}
        write_results(tmp_path / f"lag_damping={c}", json.dumps(content))
    lines = recipe.lagged_table(Folders({recipe.LAGGED.name: tmp_path}, full=True)).split("\n")[2:]
    assert lines[0] == "| 0.0 | went non-finite |  |  |"
    assert lines[2] == "| 0.5 | 100 [100, 100] | .25 (.10 to .90) | 3.0 |"
    assert lines[3] == "| 1.0 | 200 [200, 200] | - | 3.0 |"
