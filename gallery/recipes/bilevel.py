"""bilevel's regression at one rate for all: what is learned, and variations; the findings are of lags.py."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from gallery.read import (
    csv_rows,
    entries,
    figures_of,
    fixed,
    results,
    spread,
    table,
    values,
)
from gallery.recipe import Folders, Recipe, Run

QUICK = "--trainer.max_steps 250"
VARIATIONS = {
    "slow_inner": ("funcbo, `--model.inner_lr 1e-4`", "funcbo --model.inner_lr 1e-4"),
    "funcbo_softmax": ("funcbo, `--model.weights softmax`", "funcbo --model.weights softmax"),
    "aid_softmax": ("aid, `--model.weights softmax`", "aid --model.weights softmax"),
    "unroll1_softmax": ("unroll1, `--model.weights softmax`", "unroll1 --model.weights softmax"),
    "funcbo_smooth": ("funcbo, `--model.smoothing 100`", "funcbo --model.smoothing 100"),
    "aid_smooth": ("aid, `--model.smoothing 100`", "aid --model.smoothing 100"),
    "funcbo_network": ("funcbo, `--model.adjoint network`", "funcbo --model.adjoint network"),
    "aid_hessian": ("aid, `--model.curvature hessian`", "aid --model.curvature hessian"),
    "slow_drift": (
        "unroll1, `--data.window 20 --data.drift.omega .02`",
        "unroll1 --data.window 20 --data.drift.omega .02",
    ),
    "long": (
        "funcbo, `--data.window 60 --trainer.max_steps 5000`",
        "funcbo --data.window 60 --trainer.max_steps 5000",
    ),
}
ALGORITHMS = ("funcbo", "aid", "unroll1", "uniform")


def fit(name: str, words: str, minutes: float = 0.3) -> Run:
    """Return a run with other flags than shipped."""
    return Run(
        name=f"window_{name}",
        commands=(f"fit -c configs/bilevel/regression.yaml --model.algorithm {words}",),
        folder=f"bilevel/gallery/{name}",
        seeds="0, 1, 2",
        minutes=minutes,
        quick=QUICK,
        quick_minutes=0.15,
    )


WINDOW = Run(
    name="window",
    commands=("sweep -c configs/bilevel/regression.yaml --grid.model.algorithm '[funcbo,aid,unroll1,uniform]'",),
    folder="bilevel/regression-sweep",
    seeds="0, 1, 2",
    minutes=0.7,
    quick=QUICK,
)
UNROLL = fit("unroll_16", "unroll1 --model.unroll_steps 16 --model.inner_steps 16", 0.5)
OTHERS = [fit(name, words, 1.5 if name == "long" else 0.3) for name, (_, words) in VARIATIONS.items()]


def cell(at: Folders, algorithm: str) -> Path:
    """Return a cell of the sweep."""
    return at["window"] / f"algorithm={algorithm}"


def listed(found: list[float]) -> str:
    """Write one number a seed."""
    return ", ".join(figures_of(v, 3) for v in found)


def lags(folder: Path) -> str:
    """Write each seed's three largest weights' lags."""
    each = [" ".join(f"{x:.0f}" for x in row) for row in results(folder)["arrays"]["largest_lags"]]
    return f"{each[0]} in all" if len(set(each)) == 1 and len(each) > 1 else ", ".join(each)


def losses(folder: Path, name: str, with_lags: bool = True) -> list[str]:
    """Return a row of the table of runs."""
    r = results(folder)
    same = len(set(values(r, "exact_loss"))) == 1
    return [
        name,
        spread(values(r, "outer_loss")) + (f" ({listed(values(r, 'outer_loss'))})" if with_lags else ""),
        spread(values(r, "outer_loss_all")),
        figures_of(values(r, "exact_loss")[0], 4) if same else spread(values(r, "exact_loss")),
        lags(folder) if with_lags else "-",
    ]


def window_table(at: Folders) -> str:
    """Return the runs beside the best weights."""
    rows = [losses(cell(at, a), a) for a in ALGORITHMS[:3]]
    flags = "`--model.unroll_steps 16 --model.inner_steps 16`"
    rows.append(losses(at["window_unroll_16"], f"unroll 16 ({flags})"))
    rows.append(losses(cell(at, "uniform"), "uniform", with_lags=False))
    best, weights = oracle(at["window"] / "algorithm=funcbo")
    first = " ".join(str(k + 1) for k in np.argsort(-weights)[:3])
    rows.append(["best weights, exact solver", best, "", best, first])
    lines = table("run | last sixth | whole stream | J(lambda) | lags", rows).split("\n")
    return "\n".join([lines[0], "|---|---:|---:|---:|---|", *lines[2:]]).replace("|  |", "| |")


def oracle(folder: Path) -> tuple[str, np.ndarray]:
    """Return the least loss, written, and the weights that have it."""
    from lightning_toys.bilevel.regression.drift import ExactLoss, Sine

    s = results(folder)["settings"]
    drift = Sine(s["data.drift.amplitude"], s["data.drift.omega"])
    exact = ExactLoss(drift, s["data.window"], s["data.outputs"], s["data.noise"])
    return figures_of(exact.references()["oracle"], 4), exact.oracle()


def oracle_table(at: Folders) -> str:
    """Return what fixed windows score with an exact inner solver."""
    rows = []
    for name, folder in (
        (".2, 60", at["window_long"]),
        (".2, 40 (shipped)", cell(at, "funcbo")),
        (".02, 20", at["window_slow_drift"]),
    ):
        r = {k: v["exact_loss"] for k, v in results(folder)["references"].items()}
        keys = ("oracle", "uniform", "lag_1", "no_tracking")
        rows.append([name, *(figures_of(r[k], 4) for k in keys)])
    return table("omega, W | best | equal weights | lag 1 alone | no tracking", rows)


def variations_table(at: Folders) -> str:
    """Return the runs with another flag."""
    rows = []
    for name, (label, _) in VARIATIONS.items():
        folder = at[f"window_{name}"]
        r = results(folder)
        outer, exact = values(r, "outer_loss"), values(r, "exact_loss")
        if name == "aid_hessian":  # seeds so far apart have no mean worth a word
            rows.append([label, listed(outer), listed(exact)])
            continue
        best = f" (best {oracle(folder)[0]})" if name in ("slow_drift", "long") else ""
        rows.append([label, spread(outer), spread(exact) + best])
    return table("variation (shipped configuration else) | last sixth | J(lambda)", rows)


def left(at: Folders) -> list[float]:
    """Return the outer loss minus J(lambda) at seed 0, of the runs that learn their weights."""
    found = [results(cell(at, a)) for a in ALGORITHMS[:3]]
    return [values(r, "outer_loss")[0] - values(r, "exact_loss")[0] for r in [*found, results(at["window_unroll_16"])]]


def validated(folder: Path, step: int | None = None) -> float:
    """Return the outer loss of the last validation, or of the last up to a step."""
    rows = {int(r["step"]): r["eval/outer_loss"] for r in csv_rows(folder / "metrics.csv") if r.get("eval/outer_loss")}
    return float(rows[max(k for k in rows if step is None or k <= step)])


def above_best(folder: Path) -> float:
    """Return by how much the worst seed's J(lambda) is above the best, rounded up to a tenth."""
    r = results(folder)
    worst = max(values(r, "exact_loss")) - float(r["references"]["oracle"]["exact_loss"])
    return math.ceil(worst * 10) / 10


RECIPE = Recipe(
    name="bilevel",
    runs=(WINDOW, UNROLL, *OTHERS),
    figures=entries(
        ["window"],
        {
            "bilevel_outer_loss": "comparison/outer_loss_curves.png",
            "bilevel_weights": "algorithm=funcbo/figures/weights.png",
        },
    ),
    tables=(
        *entries(["window", "window_long", "window_slow_drift"], {"bilevel.oracle": oracle_table}),
        *entries(["window", "window_unroll_16"], {"bilevel.window": window_table}),
        *entries([run.name for run in OTHERS], {"bilevel.variations": variations_table}),
    ),
    numbers=(
        *entries(
            ["window", "window_unroll_16"],
            {
                "bilevel.rest.least": lambda at: fixed(min(left(at)), 1),
                "bilevel.rest.most": lambda at: fixed(max(left(at)), 1),
            },
        ),
        *entries(
            ["window_long"],
            {
                "bilevel.long.J": lambda at: fixed(above_best(at["window_long"]), 1),
                "bilevel.long.early": lambda at: fixed(validated(at["window_long"], 1000), 1),
                "bilevel.long.late": lambda at: fixed(validated(at["window_long"]), 1),
            },
        ),
    ),
)
