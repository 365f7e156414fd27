"""The figures that an experiment adds to a comparison of its runs.

results.json names the function (``comparison_figures``: "package.module.function"), so that a comparison imports that
function alone, and where there is none, no experiment at all.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from lightning_toys.commands.compare.runs import Run
from lightning_toys.commands.experiments import public_name
from lightning_toys.errors import note

# results of 0.1.0 name their module's class alone
OLDER = {
    "lightning_toys.generative_policy.GaussianPolicy": "lightning_toys.generative_policy.figures",
    "lightning_toys.generative_policy.MeanFlowPolicy": "lightning_toys.generative_policy.figures",
    "lightning_toys.generative_policy.FlowPolicy": "lightning_toys.generative_policy.figures",
    "lightning_toys.generative_policy.BanditPolicy": "lightning_toys.generative_policy.bandit_figures",
    "lightning_toys.bilevel.WindowRegression": "lightning_toys.bilevel.regression.figures",
    "lightning_toys.bilevel.BilevelControl": "lightning_toys.bilevel.control.figures",
}


def figures_function(content: dict[str, Any]) -> str:
    """Return the full name of the function that draws runs side by side; empty where there is none."""
    named = content.get("comparison_figures")
    if named is None and (place := OLDER.get(public_name(content.get("module", "")))):
        return f"{place}.compare_figures"
    return named or ""


def own_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the figures by file name that the first run's experiment draws of all runs."""
    name = figures_function(runs[0].content)
    if not name:
        return {}
    module, _, function = name.rpartition(".")
    try:
        draw = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        note(f"no figures by {name}: {' '.join(str(error).split())[:160]}")
        return {}
    return dict(draw({r.name: r.folder for r in runs}))
