"""bilevel's regression at the settings of the code OFBO: what do its algorithms come to, with the sign mended?"""

from __future__ import annotations

from gallery.read import entries, short, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.lags import FAILED, finished
from lightning_toys.stats import format_estimate, mean_ci

CONFIG = "-c configs/bilevel/regression_ofbo.yaml"
CELLS = {  # OFBO smooths the functional hypergradient alone
    "funcbo, smoothed": "",
    "funcbo": "--model.smoothing 1",
    "aid": "--model.algorithm aid --model.smoothing 1",
    "unroll1": "--model.algorithm unroll1 --model.smoothing 1 --model.inner_steps 1",  # its network has that step alone
    "lag_1": "--model.algorithm lag_1",
    "no_tracking": "--model.algorithm no_tracking",
}
OFBO = Run(
    name="ofbo",
    commands=tuple(
        f"fit {CONFIG} {words} --figures.enabled false --run.variant ofbo --run.name {name.replace(', ', '-')}".replace(
            "  ", " "
        )
        for name, words in CELLS.items()
    ),
    folder="bilevel/ofbo",
    seeds="0 to 2",
    minutes=15,
    quick=None,
    keeps=True,
    may_diverge=True,
)
METRICS = {"outer_loss_all": "whole stream", "outer_loss": "last sixth", "exact_loss": "J(lambda), last sixth"}


def ofbo_table(at: Folders) -> str:
    """Return each algorithm's losses at OFBO's settings."""
    rows = []
    for name in CELLS:
        content = finished(at[OFBO.name] / name.replace(", ", "-"))
        if content is None:
            rows.append([name, FAILED, "", ""])
            continue
        found = [values(content, m) if m in content["metrics"] else [] for m in METRICS]
        rows.append([name, *(short(format_estimate(mean_ci(v))) if v else "-" for v in found)])
    return table(f"algorithm | {' | '.join(METRICS.values())}", rows)


RECIPE = Recipe(name="ofbo", runs=(OFBO,), tables=entries([OFBO.name], {"bilevel.ofbo": ofbo_table}))
