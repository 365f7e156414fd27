"""bilevel's regression at the settings of the code OFBO: what do its algorithms come to, with the sign mended?"""

from __future__ import annotations

from gallery.read import entries, figures_of, table
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.lags import FAILED, finished

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
    """Return each algorithm's losses at OFBO's settings, each seed's."""
    rows = []
    for name in CELLS:
        content = finished(at[OFBO.name] / name.replace(", ", "-"))
        if content is None:
            rows.append([name, FAILED, "", ""])
            continue
        found = [content["metrics"].get(m, {"values": []})["values"] for m in METRICS]
        # each seed: of three positive numbers that differ by more than their mean an interval would reach below 0
        rows.append(
            [name, *(", ".join("-" if x is None else figures_of(x, 3) for x in v) if v else "-" for v in found)]
        )
    return table(f"algorithm | {' | '.join(METRICS.values())}", rows)


RECIPE = Recipe(name="ofbo", runs=(OFBO,), tables=entries([OFBO.name], {"bilevel.ofbo": ofbo_table}))
