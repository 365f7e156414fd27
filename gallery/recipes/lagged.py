"""bilevel's control: does damping keep the agent whose model follows the values as they are from oscillating?"""

from __future__ import annotations

import numpy as np

from gallery.read import entries, figures_of, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.agents import CONFIG, FAILED, QUIET, SCORED, iqm
from gallery.recipes.lags import finished

DAMPINGS = ("0.0", "0.1", "0.5", "1.0")
LAGGED = Run(
    name="control_lagged",
    commands=(
        f"sweep {CONFIG} --model.agent lagged --model.model_hidden_dim 8 --model.inner_lr 1e-3 "
        f"--grid.model.solver.lag_damping '[{','.join(DAMPINGS)}]' --model.seeds '{SCORED}' "
        f"--trainer.val_check_interval 10000 --model.eval_episodes 100 {QUIET} --run.variant control_lagged",
    ),
    folder="bilevel/control_lagged",
    seeds="10 to 25",
    minutes=12,
    quick=None,
    keeps=True,
    may_diverge=True,
)


def lagged_table(at: Folders) -> str:
    """Return by damping the return, the values on the wrong side of where their target would settle, and d - y."""
    rows = []
    for c in DAMPINGS:
        content = finished(at[LAGGED.name] / f"lag_damping={c}")
        if content is None:
            rows.append([c, FAILED, "", ""])
            continue
        wrong = values(content, "wrong_side") if "wrong_side" in content["metrics"] else []  # with c = 1 there is none
        spread = [figures_of(float(x), 2) for x in (np.median(wrong), min(wrong), max(wrong))] if wrong else []
        error = figures_of(float(np.median(values(content, "td_error"))), 2)
        span = "{} ({} to {})".format(*spread) if spread else "-"
        rows.append([c, iqm(np.array(values(content, "return"))), span, error])
    head = "damping c | return, interquartile mean | values on the wrong side, median (range) | d - y, median"
    return table(head, rows)


RECIPE = Recipe(name="lagged", runs=(LAGGED,), tables=entries([LAGGED.name], {"agents.lagged": lagged_table}))
