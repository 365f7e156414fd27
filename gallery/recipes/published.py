"""flow_vs_regression's published tables: 3 tasks, 5 modes, 2 losses, 2 networks, 3 seeds, by one sweep."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from itertools import product

from matplotlib.axes import Axes

from gallery.read import Content, by_seed, entries, figures_of, results, table, values
from gallery.recipe import Entry, Folders, Recipe, Run
from gallery.verdicts import (
    Published,
    claim_verdict,
    level_verdict,
    number_verdict,
    p_words,
    paired_ratio,
    rounded,
    summed_up,
    welch,
)
from lightning_toys.plotting import COLOURS, GREY, MARKERS, new_figure
from lightning_toys.stats import holm, mean_ci, written

KINDS, MODES, LOSSES = ("concat", "film"), ("regression", "flow", "straight_flow", "mip"), ("l2", "l1")
TASKS = ("reconstruction", "piecewise", "rotation")
SWEEP = (
    "sweep --grid.config '["
    + ",".join(f"configs/flow_vs_regression/published_{t}.yaml" for t in TASKS)
    + "]' --grid.model.mode '[regression,flow,straight_flow,mip]' --grid.model.network.kind '[concat,film]' "
    "--grid.model.loss '[l1,l2]' --run.variant published --sweep.jobs 2"
)
TEST = "test -c configs/flow_vs_regression/published_reconstruction.yaml --run.variant published --run.name"
X0 = "--data.num_eval 1000 --model.evaluation.test_x0 '[zeros,gaussian]' --model.evaluation.draws 64"
RAW = "--model.evaluation.weights raw"


def name_of(task: str, mode: str, kind: str, loss: str) -> str:
    """Return the name of a cell of the sweep."""
    return f"config=published_{task},mode={mode},kind={kind},loss={loss}"


PUBLISHED = Run(
    name="published",
    commands=(
        SWEEP,
        *(f"{TEST} {name_of(TASKS[0], *cell)} {RAW}" for cell in product(MODES, KINDS, LOSSES)),
        *(f"{TEST} {name_of(TASKS[0], 'flow', kind, 'l2')} {X0} {RAW}" for kind in KINDS),
    ),
    folder="flow_vs_regression/published",
    seeds="42, 43, 44 (piecewise: 0, 1, 2)",
    minutes=240,
    quick="--trainer.max_epochs 20 --data.num_eval 200 --model.evaluation.draws 4 --model.seeds '[42,43]'",
    quick_minutes=4,
)

# label: the mode that is trained, and the readout
READOUTS = {
    "regression": ("regression", "direct"),
    "flow, 1 Euler step": ("flow", "euler-1"),
    "flow, 9 Euler steps": ("flow", "euler-9"),
    "straight_flow": ("straight_flow", "affine-1"),
    "mip": ("mip", "two-step"),
    "mip one-step": ("mip", "one-step"),
}
STEPS = ("1 Euler step", "9 Euler steps")
ROWS = tuple(label for label in READOUTS if label != "flow, 9 Euler steps")  # of the published table
# RMSE of the reconstruction, trained with L2: mean and standard deviation over three seeds
NUMBERS = {
    "concat": (
        Published(0.003314, 0.000091),
        Published(0.0716, 0.0075),
        Published(0.00507, 0.0014),
        Published(0.00486, 0.0002),
        Published(0.00412, 0.0005),
    ),
    "film": (
        Published(0.008062, 0.0074),
        Published(0.0668, 0.0096),
        Published(0.00680, 0.0038),
        Published(0.00402, 0.0003),
        Published(0.003197, 0.0005),
    ),
}
BOUNDARY = 0.401  # of regression, concat, in the piecewise task; published without an error
CELLS = [(row, kind) for kind in KINDS for row in range(len(ROWS))]


def cell(at: Folders, task: str, mode: str, kind: str, loss: str, weights: str = "raw") -> Content:
    """Return a cell's test: of the reconstruction, whose runs average their weights, of the weights asked for."""
    asked = {}
    if task == "reconstruction":  # on as many points as the sweep's own tests: not those that look at x0
        asked = {"model__evaluation__weights": weights, "model__evaluation__test_x0": "['zeros']"}
    return results(at["published"] / name_of(task, mode, kind, loss), "test", **asked)


def errors(at: Folders, label: str, kind: str, weights: str) -> dict[int, float]:
    """Return a row's reconstruction errors by seed."""
    mode, readout = READOUTS[label]
    return by_seed(cell(at, "reconstruction", mode, kind, "l2", weights), f"l2@zeros/{readout}")


def readout(content: Content, metric: str) -> str:
    """Write a metric of one readout."""
    return written(mean_ci(values(content, metric)))


def reconstruction_table(at: Folders) -> str:
    """Return the averaged weights' errors beside the last step's."""
    rows = []
    for label in READOUTS:
        found = [list(errors(at, label, kind, weights).values()) for weights in ("ema", "raw") for kind in KINDS]
        rows.append([label, *(written(mean_ci(x)) for x in found)])
    return table("mode | concat | film | concat, last step | film, last step", rows)


def start_table(at: Folders) -> str:
    """Return the flow's last step from zeros and from Gaussian draws."""
    solvers = ("euler-1", "euler-2", "euler-4", "euler-9", "dopri5")
    rows = []
    for kind in KINDS:
        folder = at["published"] / name_of("reconstruction", "flow", kind, "l2")
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
        one, nine = (mean_ci(list(errors(at, f"flow, {n}", kind, "raw").values())).mean for n in STEPS)
        found.append(one / nine)
    return f"{min(found):.2g} to {max(found):.2g}"


def piecewise(at: Folders) -> Content:
    """Return the test of the published boundary number's cell."""
    return cell(at, "piecewise", "regression", "concat", "l2")


def reference(content: Content, name: str, metric: str) -> str:
    """Write what a row without a network scores; a dash where it has no such metric."""
    value = content["references"][name].get(metric)
    if value is None:
        return "-"
    return f"{value:.0e}" if abs(value) < 1e-4 else f"{value:.4g}"


def boundary_table(at: Folders) -> str:
    """Return the two starts beside the rows without a network."""
    r, names = piecewise(at), ("boundary", "off_subspace", "l2")
    rows = [["x0 = 0, as it was trained", *(readout(r, f"{n}@zeros/direct") for n in names)]]
    rows.append(["x0 Gaussian, as published", *(readout(r, f"{n}@gaussian/direct") for n in names)])
    rows += [[f"reference: {name}", *(reference(r, name, n) for n in names)] for name in ("zero", "linear")]
    return table(f"evaluated from | {' | '.join(names)}", rows)


def whole_table(at: Folders, task: str, columns: Iterable[tuple[str, str, str]]) -> str:
    """Return a task's table: a row for each mode and loss, a column for each (heading, metric, x0) and network."""
    columns = tuple(columns)
    rows = []
    for loss, (label, (mode, name)) in product(LOSSES, READOUTS.items()):
        found = {kind: cell(at, task, mode, kind, loss) for kind in KINDS}
        row = [readout(found[kind], f"{metric}@{x0}/{name}") for _, metric, x0 in columns for kind in KINDS]
        rows.append([label, loss.upper(), *row])
    one = cell(at, task, "regression", "concat", "l2")
    for name in ("zero", "nearest", "linear", "cubic_spline", "gaussian_process"):
        row = [reference(one, name, metric) for _, metric, _ in columns for _ in KINDS]
        rows.append([f"reference: {name}", "", *row])
    head = " | ".join(f"{heading}, {kind}" for heading, _, _ in columns for kind in KINDS)
    return table(f"mode | trained with | {head}", rows, left=2).replace("|  |", "| |")


def level_table(at: Folders) -> str:
    """Return each published number beside ours by the same protocol, and whether it is reproduced."""
    ours = [summed_up(list(errors(at, ROWS[row], kind, "raw").values())) for row, kind in CELLS]
    ratios = [welch(o, NUMBERS[kind][row]) for o, (row, kind) in zip(ours, CELLS, strict=True)]
    adjusted = holm([r.p_value for r in ratios])
    rows = []
    for (row, kind), o, ratio, p in zip(CELLS, ours, ratios, adjusted, strict=True):
        said = NUMBERS[kind][row]
        numbers = [f"{figures_of(x.mean, 3)} ± {figures_of(x.sd, 2)}" for x in (said, o)]
        rows.append([ROWS[row], kind, *numbers, str(ratio), p_words(p), level_verdict(ratio, p)])
    head = "mode | network | published, mean ± SD | ours, mean ± SD | ours / published (95 %) | p (Holm) | verdict"
    return table(head, rows, left=2)


def claim_table(at: Folders) -> str:
    """Return each published difference from regression beside ours, by its protocol and mended, with a verdict."""
    claims = [(row, kind) for row, kind in CELLS if row]
    said = [welch(NUMBERS[kind][row], NUMBERS[kind][0]) for row, kind in claims]
    plain, mended, change = [], [], []
    for row, kind in claims:
        better = ROWS[row].replace(*STEPS)
        plain.append(paired_ratio(errors(at, ROWS[row], kind, "raw"), errors(at, ROWS[0], kind, "raw")))
        mended.append(paired_ratio(errors(at, better, kind, "ema"), errors(at, ROWS[0], kind, "ema")))
        raw, ema = (
            {seed: e / errors(at, ROWS[0], kind, w)[seed] for seed, e in errors(at, label, kind, w).items()}
            for label, w in ((ROWS[row], "raw"), (better, "ema"))
        )
        change.append(paired_ratio(raw, ema))
    p = [holm([r.p_value for r in family]) for family in (said, plain, mended, change)]
    rows = []
    for k, (row, kind) in enumerate(claims):
        word = claim_verdict(said[k].value, (plain[k].value, p[1][k]), (mended[k].value, p[2][k]), p[3][k])
        cells = [str(r[k]) for r in (plain, mended)]
        shown = [
            f"{rounded(said[k].value)}, {p_words(p[0][k])}",
            *(f"{c}, {p_words(p[i][k])}" for i, c in enumerate(cells, 1)),
        ]
        rows.append([f"{ROWS[row]} / regression", kind, *shown, word])
    r = piecewise(at)
    starts = [by_seed(r, f"boundary@{x0}/direct") for x0 in ("gaussian", "zeros")]
    means = [mean_ci(list(x.values())) for x in starts]
    word = number_verdict(BOUNDARY, means[0], means[1], paired_ratio(*starts).p_value)
    rows.append(["boundary of regression", "concat", figures_of(BOUNDARY, 3), *(written(m) for m in means), word])
    head = "claim | network | published, p | ours by its protocol, p | ours mended, p | verdict"
    return table(head, rows, left=2)


def boundary_change(at: Folders) -> str:
    """Write how many times as large the boundary share is from Gaussian x0, in the same checkpoints."""
    r = piecewise(at)
    ratio = paired_ratio(*(by_seed(r, f"boundary@{x0}/direct") for x0 in ("gaussian", "zeros")))
    return f"{ratio}, p = {p_words(ratio.p_value)}"


def interval(ax: Axes, mean: float, half: float, y: float, colour: str, marker: str, label: str | None) -> None:
    """Draw a mean and its interval; what reaches below 0 is cut off near the axis' left end."""
    left = min(half, 0.95 * mean)
    ax.errorbar(mean, y, xerr=[[left], [half]], fmt=marker, color=colour, capsize=3, markersize=5.5, label=label)


def hours(at: Folders) -> str:
    """Write what the sweep and its tests took, two at a time."""
    stamp = json.loads((at["published"].parents[1] / "stamps/published.json").read_text())
    return f"{stamp['seconds'] / 3600:.1f} hours"


def drawing(at: Folders) -> str:
    """Draw ours beside the published numbers."""
    figure, axes = new_figure(1, 2, size=(9.6, 4.2), sharey=True, sharex=True)
    shown = list(READOUTS)
    linear = cell(at, "reconstruction", "regression", "concat", "l2")["references"]["linear"]["l2"]
    for ax, kind in zip(axes[0], KINDS, strict=True):
        said = {label: NUMBERS[kind][row] for row, label in enumerate(ROWS)}
        for i, label in enumerate(shown):
            for k, weights in enumerate(("raw", "ema")):
                found = list(errors(at, label, kind, weights).values())
                name = ("ours, last step", "ours, averaged weights")[k] if i == 0 else None
                y = i + 0.2 * k
                ax.plot(found, [y] * len(found), MARKERS[k], color=COLOURS[k], alpha=0.45, markersize=4)
                interval(ax, mean_ci(found).mean, mean_ci(found).half_width, y, COLOURS[k], MARKERS[k], name)
            if label in said:
                half = 4.303 * said[label].sd / said[label].n ** 0.5  # Student's t, two degrees of freedom
                interval(ax, said[label].mean, half, i - 0.2, "black", "D", "published" if i == 0 else None)
        ax.axvline(linear, color=GREY, linestyle=":", linewidth=1.3, label="straight lines between the points")
        ax.set_xscale("log")
        ax.set_xlim(0.0015, 0.3)
        ax.set_title(kind)
    figure.supxlabel("RMSE on 100 000 points (each seed; mean and 95 % interval)", fontsize=10)
    axes[0, 0].set_yticks(range(len(shown)), shown)
    axes[0, 0].set_ylim(len(shown) - 0.5, -0.5)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    path = at["published"] / "published_numbers.png"
    figure.savefig(path, dpi=110)
    return str(path)


WHOLE = {
    "reconstruction": (("RMSE", "l2", "zeros"),),
    "piecewise": (
        ("RMSE", "l2", "zeros"),
        ("boundary", "boundary", "zeros"),
        ("boundary from Gaussian x0", "boundary", "gaussian"),
    ),
    "rotation": (
        ("RMSE", "l2", "zeros"),
        ("perpendicular", "perpendicular", "zeros"),
        ("cosine", "cosine", "zeros"),
    ),
}

RECIPE = Recipe(
    name="published",
    runs=(PUBLISHED,),
    figures=(
        Entry(
            "published_piecewise_boundaries",
            ("published",),
            f"{name_of('piecewise', 'regression', 'concat', 'l2')}/figures/boundaries.png",
        ),
        Entry("published_numbers", ("published",), drawing),
    ),
    tables=entries(
        ["published"],
        {
            "flow.reconstruction": reconstruction_table,
            "flow.start_law": start_table,
            "flow.boundary": boundary_table,
            "published.levels": level_table,
            "published.claims": claim_table,
            **{f"published.{t}": partial(whole_table, task=t, columns=WHOLE[t]) for t in TASKS},
        },
    ),
    numbers=entries(
        ["published"],
        {
            "flow.linear": lambda at: figures_of(
                cell(at, "reconstruction", "regression", "concat", "l2", "ema")["references"]["linear"]["l2"], 4
            ),
            "flow.nine_steps": nine_steps,
            "published.boundary": boundary_change,
            "published.hours": hours,
        },
    ),
)
