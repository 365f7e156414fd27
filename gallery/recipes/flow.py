"""flow_vs_regression's demo: what do flows and regression do between the data points?"""

from __future__ import annotations

from gallery.read import Content, entries, figures_of, geometric, paired, ratio, results, values
from gallery.recipe import Entry, Folders, Recipe, Run

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


def cell(at: Folders, run: str, mode: str) -> Content:
    """Return a cell's results."""
    return results(at[run] / f"mode={mode}")


def flow_and_regression(run: str, name: str) -> tuple[Entry, ...]:
    """Return the numbers of a run that has both modes: l2 of each, and flow beside regression."""

    def both(at: Folders) -> tuple[Content, Content]:
        return cell(at, run, "flow"), cell(at, run, "regression")

    return entries(
        [run],
        {
            f"flow.{name}.difference": lambda at: paired(*both(at), "l2"),
            f"flow.{name}.flow": lambda at: geometric(both(at)[0], "l2", 2),
            f"flow.{name}.regression": lambda at: geometric(both(at)[1], "l2", 2),
            f"flow.{name}.ratio": lambda at: ratio(*both(at), "l2"),
        },
    )


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
    numbers=(
        *flow_and_regression("demo", "demo"),
        *flow_and_regression("demo_averaged", "averaged"),
        *entries(
            ["demo"],
            {
                "flow.demo.worst": lambda at: figures_of(max(values(cell(at, "demo", "regression"), "l2")), 2),
                "flow.demo.linear": lambda at: figures_of(cell(at, "demo", "flow")["references"]["linear"]["l2"], 2),
            },
        ),
    ),
)
