"""flow_vs_regression's demo: what do flows and regression do between the data points?"""

from __future__ import annotations

from gallery.read import Content, csv_rows, entries, figures_of, geometric, paired, ratio, results, values
from gallery.recipe import Entry, Folders, Recipe, Run
from lightning_toys.plotting import COLOURS, GREY, new_figure

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

# both again, ten times as long: does more training close the gap?
LONGER = tuple(
    Run(
        name=f"demo_{name}",
        commands=(
            "sweep -c configs/flow_vs_regression/demo.yaml --grid.model.mode '[regression,flow]' "
            f"--trainer.max_epochs 50000 --trainer.val_check_interval 2000 {words}--run.variant demo-{name}",
        ),
        folder=f"flow_vs_regression/demo-{name}",
        seeds="0 to 7",
        minutes=15,
        quick="--trainer.max_epochs 500 --trainer.val_check_interval 200 --model.seeds '[0,1,2]'",
        keeps=True,
        curves=("eval/l2", "interval/eval/l2/*"),
    )
    for name, words in {
        "longer": "",
        "longer_averaged": "--model.ema_decay 0.999 --model.evaluation.weights ema ",
    }.items()
)

STEPS = 2  # an epoch: 50 points in batches of 32, the last batch kept


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


def error_by_epochs(at: Folders) -> str:
    """Draw the error of both modes and both weights against the epochs, with intervals."""
    figure, axes = new_figure(size=(7.0, 4.2))
    ax = axes[0, 0]
    kinds = [(run, mode) for run in LONGER for mode in ("regression", "flow")]
    for k, (run, mode) in enumerate(kinds):
        rows = [r for r in csv_rows(at[run.name] / f"mode={mode}" / "metrics.csv") if r["eval/l2"]]
        assert len(rows) > 1, f"{run.name}, {mode}: no curve"
        epochs = [int(r["step"]) / STEPS for r in rows]
        mean, lo, hi = (
            [float(r[f"interval/eval/l2/{which}"]) for r in rows] for which in ("geometric_mean", "lo", "hi")
        )
        weights = "last step" if run is LONGER[0] else "averaged"
        style = "-" if run is LONGER[0] else "--"
        ax.plot(epochs, mean, style, color=COLOURS[k], lw=1.4, label=f"{mode}, {weights}")
        ax.fill_between(epochs, lo, hi, color=COLOURS[k], alpha=0.2, lw=0)
    straight = cell(at, LONGER[0].name, "flow")["references"]["linear"]["l2"]
    ax.axhline(straight, color=GREY, ls=":", lw=1.2, label="straight lines")
    ax.set(xlabel="epochs", ylabel="l2, geometric mean, 95 % interval", yscale="log")
    ax.legend(frameon=False, ncols=2)
    path = at[LONGER[0].name] / "error_by_epochs.png"
    figure.savefig(path, dpi=110)
    return str(path)


RECIPE = Recipe(
    name="flow",
    runs=(DEMO, AVERAGED, *LONGER),
    figures=(
        *entries(
            ["demo"],
            {
                "demo_l2": "comparison/l2.png",
                "demo_flow_predictions": "mode=flow/figures/predictions.png",
                "demo_flow_samplers": "mode=flow/figures/samplers.png",
            },
        ),
        *entries([run.name for run in LONGER], {"demo_error_by_epochs": error_by_epochs}),
    ),
    tables=entries(["demo"], {"flow.demo": lambda at: (at["demo"] / "comparison/comparison.md").read_text().strip()}),
    numbers=(
        *flow_and_regression("demo", "demo"),
        *flow_and_regression("demo_averaged", "averaged"),
        *(entry for run in LONGER for entry in flow_and_regression(run.name, run.name.removeprefix("demo_"))),
        *entries(
            ["demo"],
            {
                "flow.demo.worst": lambda at: figures_of(max(values(cell(at, "demo", "regression"), "l2")), 2),
                "flow.demo.linear": lambda at: figures_of(cell(at, "demo", "flow")["references"]["linear"]["l2"], 2),
            },
        ),
    ),
)
