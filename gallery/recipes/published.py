"""flow_vs_regression's published tables: 3 tasks, 5 modes, 2 losses, 2 networks, 3 seeds, by one sweep."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from itertools import product

from matplotlib.axes import Axes

from gallery.read import Content, by_seed, entries, figures_of, results, short, table, values
from gallery.recipe import Entry, Folders, Recipe, Run
from gallery.verdicts import (
    LEVEL,
    Comparison,
    level_verdict,
    number_verdict,
    p_words,
    paired_ratio,
    percent,
    rounded,
    said,
    summed_up,
    welch,
    written_sd,
)
from lightning_toys.plotting import COLOURS, GREY, MARKERS, new_figure
from lightning_toys.stats import format_estimate, holm, mean_ci

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
    "concat": (".003314 ± .000091", ".0716 ± .0075", ".00507 ± .0014", ".00486 ± .0002", ".00412 ± .0005"),
    "film": (".008062 ± .0074", ".0668 ± .0096", ".00680 ± .0038", ".00402 ± .0003", ".003197 ± .0005"),
}
BOUNDARY = 0.401  # of regression, concat, in the piecewise task; published without an error
LEFT = 0.0015  # of the picture's axis
TRAINED_APART = "mip one-step"  # published: of a network of its own, without time; ours is read out of mip's
CELLS = [(row, kind) for kind in KINDS for row, label in enumerate(ROWS) if label != TRAINED_APART]


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
    return format_estimate(mean_ci(values(content, metric)))


def reconstruction_table(at: Folders) -> str:
    """Return the averaged weights' errors beside the last step's."""
    rows = []
    for label in READOUTS:
        found = [list(errors(at, label, kind, weights).values()) for weights in ("ema", "raw") for kind in KINDS]
        rows.append([label, *(format_estimate(mean_ci(x)) for x in found)])
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


def nine_steps(at: Folders, weights: str) -> str:
    """Return by how much nine Euler steps divide the error, over the networks."""
    found = []
    for kind in KINDS:
        one, nine = (mean_ci(list(errors(at, f"flow, {n}", kind, weights).values())).mean for n in STEPS)
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
    ours = {c: summed_up(list(errors(at, ROWS[c[0]], c[1], "raw").values())) for c in product(range(len(ROWS)), KINDS)}
    ratios = {(row, kind): welch(ours[row, kind], said(NUMBERS[kind][row])) for row, kind in CELLS}
    adjusted = dict(zip(ratios, holm([r.p_value for r in ratios.values()]), strict=True))
    rows = []
    for kind, row in product(KINDS, range(len(ROWS))):
        c, o = (row, kind), ours[row, kind]
        numbers = [NUMBERS[kind][row], written_sd(o)]
        found = ["-", "-", "trained otherwise"]
        if c in ratios:
            found = [percent(ratios[c]), p_words(adjusted[c]), level_verdict(ratios[c], adjusted[c])]
        rows.append([ROWS[row], kind, *numbers, *found])
    head = "mode | network | published | ours | difference / published (95 %) | p (Holm) | verdict"
    return table(head, rows, left=2)


def claim_table(at: Folders) -> str:
    """Return each published difference from regression beside ours, by its protocol and mended, with a verdict."""

    def against(label: str, kind: str, weights: str) -> dict[int, float]:
        base = errors(at, ROWS[0], kind, weights)
        return {seed: e / base[seed] for seed, e in errors(at, label, kind, weights).items()}

    compared = [(row, kind) for row, kind in CELLS if row]
    published = [welch(said(NUMBERS[kind][row]), said(NUMBERS[kind][0])) for row, kind in compared]
    published_p = holm([r.p_value for r in published])
    raw = [against(ROWS[row], kind, "raw") for row, kind in compared]
    ema = [against(ROWS[row].replace(*STEPS), kind, "ema") for row, kind in compared]
    one = [dict.fromkeys(x, 1.0) for x in raw]
    plain, mended, change = (
        [paired_ratio(a, b) for a, b in zip(*x, strict=True)] for x in ((raw, one), (ema, one), (raw, ema))
    )
    claims = [i for i, p in enumerate(published_p) if p < LEVEL]
    p = {
        i: values
        for i, *values in zip(
            claims, *(holm([x[i].p_value for i in claims]) for x in (plain, mended, change)), strict=True
        )
    }
    rows = []
    for i, (row, kind) in enumerate(compared):
        cells, word = [str(plain[i]), str(mended[i]), "-"], "no claim"
        if i in p:
            cells = [f"{plain[i]}, {p_words(p[i][0])}", f"{mended[i]}, {p_words(p[i][1])}", p_words(p[i][2])]
            word = Comparison(published[i].value, plain[i], p[i][0], mended[i], p[i][1], p[i][2]).verdict
        shown = f"{rounded(published[i].value)}, {p_words(published_p[i])}"
        rows.append([f"{ROWS[row]} / regression", kind, shown, *cells, word])
    r = piecewise(at)
    starts = [by_seed(r, f"boundary@{x0}/direct") for x0 in ("gaussian", "zeros")]
    means, p_start = [mean_ci(list(x.values())) for x in starts], paired_ratio(*starts).p_value
    word = number_verdict(BOUNDARY, means[0], means[1], p_start)
    shown = figures_of(BOUNDARY, 3)
    rows.append(
        ["boundary of regression", "concat", shown, *(short(format_estimate(m)) for m in means), p_words(p_start), word]
    )
    head = "claim | network | published, p | ours by its protocol, p | ours mended, p | p of the change | verdict"
    return table(head, rows, left=2)


def boundary_change(at: Folders) -> str:
    """Write how many times as large the boundary share is from Gaussian x0, in the same checkpoints."""
    r = piecewise(at)
    ratio = paired_ratio(*(by_seed(r, f"boundary@{x0}/direct") for x0 in ("gaussian", "zeros")))
    return str(ratio)


def interval(ax: Axes, mean: float, half: float, y: float, colour: str, marker: str, label: str | None) -> None:
    """Draw a mean and its interval; what reaches below 0 is cut off at the axis' left end."""
    left = min(half, mean - LEFT)
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
        published = {label: said(text) for label, text in zip(ROWS, NUMBERS[kind], strict=True)}
        for i, label in enumerate(shown):
            for k, weights in enumerate(("raw", "ema")):
                found = list(errors(at, label, kind, weights).values())
                name = ("ours, last step", "ours, averaged weights")[k] if i == 0 else None
                y = i + 0.2 * k
                ax.plot(found, [y] * len(found), MARKERS[k], color=COLOURS[k], alpha=0.45, markersize=4)
                interval(ax, mean_ci(found).mean, mean_ci(found).half_width, y, COLOURS[k], MARKERS[k], name)
            if label in published:
                x = published[label]
                half = 4.303 * x.sd / x.n**0.5  # Student's t, two degrees of freedom
                interval(ax, x.mean, half, i - 0.2, "black", "D", "published" if i == 0 else None)
        ax.axvline(linear, color=GREY, linestyle=":", linewidth=1.3, label="straight lines between the points")
        ax.set_xscale("log")
        ax.set_xlim(LEFT, 0.3)
        ax.set_title(kind)
        ax.set_xlabel("RMSE on 100 000 points")
    figure.suptitle("reconstruction, trained with L2: each seed, mean and 95 % interval", fontsize=10)
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
            "flow.nine_steps": partial(nine_steps, weights="raw"),
            "flow.nine_steps.averaged": partial(nine_steps, weights="ema"),
            "published.boundary": boundary_change,
            "published.hours": hours,
        },
    ),
)
