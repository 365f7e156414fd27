"""bilevel's control: does damping keep the agent whose model follows the values as they are from oscillating?"""

from __future__ import annotations

import json

import numpy as np

from gallery.read import entries, figures_of, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.recipes.agents import CONFIG, QUIET, SCORED, iqm
from gallery.recipes.lags import finished
from lightning_toys.training.metrics_reader import read_run, replica_columns

DAMPINGS = ("0.0", "0.1", "0.5", "1.0")
SINCE = 5000  # the first validation that counts: before it the values have hardly begun
LAGGED = Run(
    name="control_lagged",
    commands=(
        f"sweep {CONFIG} --model.agent lagged --model.model_hidden_dim 8 --model.inner_lr 1e-3 "
        f"--grid.model.solver.lag_damping '[{','.join(DAMPINGS)}]' --model.seeds '{SCORED}' "
        f"--trainer.val_check_interval 1000 --model.eval_episodes 10 {QUIET} --run.variant control_lagged",
    ),
    folder="bilevel/control_lagged",
    seeds="10 to 25",
    minutes=15,
    quick=None,
    keeps=True,
    curves=("eval/wrong_side", "replicas/eval/wrong_side/*"),
    may_diverge=True,
)


def lagged_table(at: Folders) -> str:
    """Return by damping how far the run came, the values on the wrong side over its validations, and the return."""
    rows = []
    for c in DAMPINGS:
        folder = at[LAGGED.name] / f"lag_damping={c}"
        content, seeds = finished(folder), json.loads(SCORED)
        steps, wrong = replica_columns(read_run(folder), "eval/wrong_side", seeds)
        later = wrong[:, steps >= SINCE]
        span = "-"
        if later.size:
            each = later.mean(1)
            span = "{} ({} to {})".format(*(figures_of(float(f(each)), 2) for f in (np.median, np.min, np.max)))
        came = f"{steps[-1]:.0f}" if content else f"non-finite after {steps[-1]:.0f}" if steps.size else "non-finite"
        rows.append([c, came, span, iqm(np.array(values(content, "return"))) if content else ""])
    head = "damping c | steps | values on the wrong side, median over seeds (range) | return, interquartile mean"
    return table(head, rows)


RECIPE = Recipe(name="lagged", runs=(LAGGED,), tables=entries([LAGGED.name], {"agents.lagged": lagged_table}))
