"""flow_vs_regression's demo: what do flows and regression do between the data points?"""

from __future__ import annotations

from gallery.read import Content, entries, figures_of, geometric, paired, ratio, results, values
from gallery.recipe import Folders, Recipe, Run

DEMO = Run(
    name="demo",
    commands=("sweep -c configs/flow_vs_regression/demo.yaml --grid.model.mode '[regression,flow]'",),
    folder="flow_vs_regression/demo-sweep",
    seeds="0 to 7",
    minutes=4,
    quick="--trainer.max_epochs 500 --model.seeds '[0,1,2]'",
)


# the same training; what is scored is the average of the last thousand steps or so
AVERAGED = Run(
    name="demo_averaged",
    commands=(
        "sweep -c configs/flow_vs_regression/demo.yaml --grid.model.mode '[regression,flow]' --model.ema_decay 0.999 "
        "--model.evaluation.weights ema --run.variant demo-averaged",
    ),
    folder="flow_vs_regression/demo-averaged",
    seeds="0 to 7",
    minutes=4,
    quick="--trainer.max_epochs 500 --model.seeds '[0,1,2]'",
)


def averaged(at: Folders, mode: str) -> Content:
    """Return a cell's results, with averaged weights."""
    return results(at["demo_averaged"] / f"mode={mode}")


def demo(at: Folders, mode: str) -> Content:
    """Return a cell's results."""
    return results(at["demo"] / f"mode={mode}")


RECIPE = Recipe(
    name="flow",
    runs=(DEMO, AVERAGED),
    figures=entries(
        ["demo"],
        {
            "demo_l2": "comparison/l2.png",
            "demo_flow_predictions": "mode=flow/figures/predictions.png",
            "demo_flow_samplers": "mode=flow/figures/samplers.png",
        },
    ),
    tables=entries(["demo"], {"flow.demo": lambda at: (at["demo"] / "comparison/comparison.md").read_text().strip()}),
    numbers=entries(
        ["demo"],
        {
            "flow.demo.difference": lambda at: paired(demo(at, "flow"), demo(at, "regression"), "l2"),
            "flow.demo.worst": lambda at: figures_of(max(values(demo(at, "regression"), "l2")), 2),
            "flow.demo.regression": lambda at: geometric(demo(at, "regression"), "l2", 2),
            "flow.demo.flow": lambda at: geometric(demo(at, "flow"), "l2", 2),
            "flow.demo.ratio": lambda at: ratio(demo(at, "flow"), demo(at, "regression"), "l2"),
            "flow.demo.linear": lambda at: figures_of(demo(at, "flow")["references"]["linear"]["l2"], 2),
        },
    )
    + entries(
        ["demo_averaged"],
        {
            "flow.averaged.difference": lambda at: paired(averaged(at, "flow"), averaged(at, "regression"), "l2"),
            "flow.averaged.regression": lambda at: geometric(averaged(at, "regression"), "l2", 2),
            "flow.averaged.flow": lambda at: geometric(averaged(at, "flow"), "l2", 2),
            "flow.averaged.ratio": lambda at: ratio(averaged(at, "flow"), averaged(at, "regression"), "l2"),
        },
    ),
)
