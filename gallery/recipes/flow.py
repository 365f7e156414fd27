"""flow_vs_regression: what do flows and regression do between the data points?"""

from __future__ import annotations

from itertools import product

from gallery.read import Content, entries, figures_of, paired, results, table, values
from gallery.recipe import Folders, Recipe, Run
from lightning_toys.stats import mean_ci, written

TEST = "test -c configs/flow_vs_regression/published_reconstruction.yaml --run.variant published_reconstruction-sweep"
KINDS, MODES = ("concat", "film"), ("regression", "flow", "straight_flow", "mip")
X0 = "--data.num_eval 1000 --model.evaluation.test_x0 '[zeros,gaussian]' --model.evaluation.draws 64"
RAW = "--model.evaluation.weights raw"

DEMO = Run(
    name="demo",
    commands=("sweep -c configs/flow_vs_regression/demo.yaml --grid.model.mode '[regression,flow]'",),
    folder="flow_vs_regression/demo-sweep",
    seeds="0 to 7",
    minutes=4,
    quick="--trainer.max_epochs 500 --model.seeds '[0,1,2]'",
)
RECONSTRUCTION = Run(
    name="reconstruction",
    commands=(
        "sweep -c configs/flow_vs_regression/published_reconstruction.yaml "
        "--grid.model.network.kind '[concat,film]' --grid.model.mode '[regression,flow,straight_flow,mip]'",
        *(f"{TEST} --run.name kind={k},mode={m} {RAW}" for k, m in product(KINDS, MODES)),
        *(f"{TEST} --run.name kind={k},mode=flow {X0} {RAW}" for k in KINDS),
    ),
    folder="flow_vs_regression/published_reconstruction-sweep",
    seeds="42, 43, 44",
    minutes=240,
    quick="--trainer.max_epochs 50 --data.num_eval 200 --model.evaluation.draws 4 --model.seeds '[42,43]'",
    quick_minutes=3,
)
PIECEWISE = Run(
    name="piecewise",
    commands=("sweep -c configs/flow_vs_regression/published_piecewise.yaml --grid.model.mode '[regression]'",),
    folder="flow_vs_regression/published_piecewise-sweep",
    seeds="0, 1, 2",
    minutes=30,
    quick="--trainer.max_epochs 200 --data.num_eval 1000",
)


def demo(at: Folders, mode: str) -> Content:
    """Return a cell's results."""
    return results(at["demo"] / f"mode={mode}")


def cell(at: Folders, kind: str, mode: str, num_eval: int | None, weights: str) -> Content:
    """Return a test of a cell of the published protocol; ``num_eval`` None: of the sweep's own."""
    folder = at["reconstruction"] / f"kind={kind},mode={mode}"
    asked = {"model__evaluation__weights": weights}
    if num_eval is None:  # of as many points as the sweep's own tests: not of those that look at x0
        asked["model__evaluation__test_x0"] = "['zeros']"
    return results(folder, "test", **asked)


def readout(content: Content, metric: str) -> str:
    """Write a metric of one readout."""
    return written(mean_ci(values(content, metric)))


def reconstruction_table(at: Folders) -> str:
    """Return the averaged weights' errors beside the last step's."""
    rows = []
    for label, mode, metric in (
        ("regression", "regression", "l2"),
        ("flow, 1 Euler step", "flow", "l2@zeros/euler-1"),
        ("flow, 9 Euler steps", "flow", "l2@zeros/euler-9"),
        ("straight_flow", "straight_flow", "l2"),
        ("mip", "mip", "l2@zeros/two-step"),
        ("mip one-step", "mip", "l2@zeros/one-step"),
    ):
        rows.append([label, *(readout(cell(at, k, mode, None, w), metric) for w in ("ema", "raw") for k in KINDS)])
    return table("mode | concat | film | concat, last step | film, last step", rows)


def start_table(at: Folders) -> str:
    """Return the flow's last step from zeros and from Gaussian draws."""
    solvers = ("euler-1", "euler-2", "euler-4", "euler-9", "dopri5")
    rows = []
    for kind in KINDS:
        folder = at["reconstruction"] / f"kind={kind},mode=flow"
        r = results(folder, "test", model__evaluation__test_x0="['zeros', 'gaussian']")
        for label, metric in (
            ("zeros", "l2@zeros"),
            ("64 Gaussian draws", "l2@gaussian"),
            ("SD over the draws", "spread@gaussian"),
        ):
            rows.append([f"{kind}, {label}", *(readout(r, f"{metric}/{s}") for s in solvers)])
    return table(f"network, x0 | {' | '.join(solvers)}", rows)


def nine_steps(at: Folders) -> str:
    """Return by how much nine Euler steps divide the last step's error, over the networks."""
    found = []
    for kind in KINDS:
        r = cell(at, kind, "flow", None, "raw")
        one, nine = (mean_ci(values(r, f"l2@zeros/euler-{n}")).mean for n in (1, 9))
        found.append(one / nine)
    return f"{min(found):.2g} to {max(found):.2g}"


def boundary_table(at: Folders) -> str:
    """Return the two starts beside the rows without a network."""
    r = results(at["piecewise"] / "mode=regression", "test")
    names = ("boundary", "off_subspace", "l2")
    rows = [["x0 = 0, as it was trained", *(readout(r, f"{n}@zeros/direct") for n in names)]]
    rows.append(["x0 Gaussian, as published", *(readout(r, f"{n}@gaussian/direct") for n in names)])
    for name in ("zero", "linear"):
        found = r["references"][name]
        cells = [f"{found[n]:.4g}" if found.get(n) is not None else "-" for n in names]
        rows.append([f"reference: {name}", *(c if "e-" not in c else f"{float(c):.0e}" for c in cells)])
    return table(f"evaluated from | {' | '.join(names)}", rows)


def linear(content: Content, count: int) -> str:
    """Write what straight lines between the points score."""
    return figures_of(content["references"]["linear"]["l2"], count)


RECIPE = Recipe(
    name="flow",
    runs=(DEMO, RECONSTRUCTION, PIECEWISE),
    figures=(
        *entries(
            ["demo"],
            {
                "demo_l2": "comparison/l2.png",
                "demo_flow_predictions": "mode=flow/figures/predictions.png",
                "demo_flow_samplers": "mode=flow/figures/samplers.png",
            },
        ),
        *entries(["piecewise"], {"published_piecewise_boundaries": "mode=regression/figures/boundaries.png"}),
    ),
    tables=(
        *entries(["demo"], {"flow.demo": lambda at: (at["demo"] / "comparison/comparison.md").read_text().strip()}),
        *entries(["reconstruction"], {"flow.reconstruction": reconstruction_table, "flow.start_law": start_table}),
        *entries(["piecewise"], {"flow.boundary": boundary_table}),
    ),
    numbers=(
        *entries(
            ["demo"],
            {
                "flow.demo.difference": lambda at: paired(demo(at, "flow"), demo(at, "regression"), "l2"),
                "flow.demo.linear": lambda at: linear(demo(at, "flow"), 2),
            },
        ),
        *entries(
            ["reconstruction"],
            {
                "flow.linear": lambda at: linear(cell(at, "concat", "regression", None, "ema"), 4),
                "flow.nine_steps": nine_steps,
            },
        ),
    ),
)
