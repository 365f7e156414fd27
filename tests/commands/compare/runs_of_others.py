"""Run folders for the tests of compare, and what is asked of every comparison of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

METRIC = {"values": [1.0, 2.0], "mean": 1.5, "ci95": [0.0, 3.0]}
WHOLE: dict[str, Any] = {
    "experiment": "toy", "variant": "v", "seeds": [0, 1], "metrics": {"l2": METRIC, "l2@zeros/euler-1": METRIC},
    "references": {"zero": {"l2": 0.9}}, "label": "a", "headline": ["l2"], "metric_labels": {"l2": "RMSE"},
    "module": "lightning_toys.flow_vs_regression.FlowVsRegression", "settings": {"model.lr": 0.1},
}  # fmt: skip


def edited(path: str, value: Any) -> dict[str, Any]:
    """Return whole results with one value changed; ``...`` takes it out."""
    tree = copy.deepcopy(WHOLE)
    *heads, last = path.split("/")
    node: Any = tree
    for head in heads:
        node = node[head]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return tree


def a_run(folder: Path, content: Any = WHOLE) -> Path:
    """Make a run folder."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder
