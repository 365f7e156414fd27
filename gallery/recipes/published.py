"""flow_vs_regression's published tables: 3 tasks, 5 modes, 2 losses, 2 networks, 3 seeds, by one sweep."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from functools import cache, partial
from itertools import product
from pathlib import Path

from matplotlib.ticker import LogLocator

from gallery.published.claims import CLAIMS, COMPARED, HEADLINES, Values, compare, published_ratio
from gallery.published.record import LOSSES, METRICS, MODES, NETWORKS, Cell, cells, published
from gallery.read import Content, by_seed, entries, figures_of, results, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.verdicts import (
    Level,
    claim_verdict,
    claim_verdicts,
    geometric_mean,
    levels,
    p_words,
    paired_ratio,
    side,
    welch_ratio,
)
from lightning_toys.plotting import COLOURS, MARKERS, new_figure
from lightning_toys.stats import NOT_NEGATIVE, format_estimate, holm, mean_ci

TASKS = tuple(METRICS)
GRID = "--grid.model.network.kind '[concat,film]' --grid.model.loss '[l1,l2]'"
# four solvers' steps, where the cells' own tests have one and nine: by that their results are told apart
SAMPLERS = "'[1,2,4,9]' --model.evaluation.test_solvers '[euler,dopri5]' --model.evaluation.draws 64"
OWN_STEPS = "[1, 9]"


def name_of(cell: Cell) -> str:
    """Return the name of a cell of the sweep."""
    return f"mode={cell.mode},kind={cell.network},loss={cell.loss}"


def score_command(cell: Cell, words: str) -> str:
    """Return the command that scores a cell's checkpoint otherwise."""
    name = f"published_{cell.task}"
    config = f"configs/flow_vs_regression/{name}.yaml"
    return f"test -c {config} --run.variant {name} --run.name {name_of(cell)} {words}"


def run_of(task: str, mode: str) -> Run:
    """Return the run of a task's mode: its four cells by a sweep, each scored by its averaged weights too."""
    variant = f"published_{task}"
    sweep = (
        f"sweep -c configs/flow_vs_regression/{variant}.yaml --grid.model.mode '[{mode}]' {GRID} "
        f"--run.variant {variant} --sweep.jobs 2"
    )
    scores = [score_command(cell, "--model.evaluation.weights ema") for cell in cells(task) if cell.mode == mode]
    if (task, mode) == ("reconstruction", "flow"):
        words = f"--data.num_eval 1000 --model.evaluation.test_nfe {SAMPLERS}"
        scores += [score_command(Cell(task, "l2", kind, "flow"), words) for kind in NETWORKS]
    return Run(
        name=run_name(task, mode),
        commands=(sweep, *scores),
        folder=f"flow_vs_regression/{variant}",
        seeds="0, 1, 2",
        minutes=20,
        quick="--trainer.max_epochs 20 --data.num_eval 200 --model.seeds '[0,1]'",
        quick_minutes=1,
        keeps=True,
        cells=f"mode={mode},*",
    )


def run_name(task: str, mode: str) -> str:
    """Return the name of the run of a task's mode."""
    return f"published_{task}_{mode}"


def names_of(*tasks: str) -> list[str]:
    """Return the names of all runs of some tasks."""
    return [run_name(task, mode) for task in tasks for mode in MODES]


# the readout by the published protocol, and with a flow's single Euler step mended
STEPS = {
    "regression": ("direct", "direct"),
    "flow": ("euler-1", "euler-9"),
    "straight_flow": ("affine-1", "affine-1"),
    "mip": ("two-step", "two-step"),
    "mip_one_step": ("one-step", "one-step"),
}
# rows of our own tables: the mode that is trained, and the readout
READOUTS = {
    "regression": ("regression", "direct"),
    "flow, 1 Euler step": ("flow", "euler-1"),
    "flow, 9 Euler steps": ("flow", "euler-9"),
    "straight_flow": ("straight_flow", "affine-1"),
    "mip": ("mip", "two-step"),
    "mip, second step from the path's point": ("mip", "two-step-path"),
    "mip, first step": ("mip", "one-step"),
    "mip_one_step": ("mip_one_step", "one-step"),
}
REGRESSION = Cell("piecewise", "l2", "concat", "regression")  # whose boundary is the record's odd one


@cache
def scored(folder: Path, weights: str, steps: str) -> Content:
    """Return a cell's test with the last step's weights or the averaged ones."""
    return results(folder, "test", model__evaluation__weights=weights, model__evaluation__test_nfe=steps)


def of(at: Folders, cell: Cell, weights: str = "raw") -> Content:
    """Return a cell's test."""
    return scored(at[run_name(cell.task, cell.mode)] / name_of(cell), weights, OWN_STEPS)


def metric_name(cell: Cell, metric: str, mended: Collection[str] = ()) -> str:
    """Return where results.json has a published metric; ``METRIC#READOUT`` asks for another readout."""
    metric, _, readout = metric.partition("#")
    readout = readout or STEPS[cell.mode]["steps" in mended]
    start = "zeros"
    if metric == "boundary" or metric.startswith("subspace"):
        start = "zeros" if "x0" in mended else "gaussian"
        metric = metric if "truth" in mended and metric != "boundary" else f"published_{metric}"
    elif metric.startswith("cosine"):
        metric = f"published_{metric}"
    return f"{metric.replace('perpendicular_mean', 'perpendicular')}@{start}/{readout}"


def ours(at: Folders, cell: Cell, metric: str, mended: Collection[str] = ()) -> Values:
    """Return our values by seed, with some of the published protocol's flaws mended: a source of claims."""
    content = of(at, cell, "ema" if "weights" in mended else "raw")
    return by_seed(content, metric_name(cell, metric, mended))


def family(at: Folders, task: str, metric: str) -> list[Level]:
    """Return ours / published of a metric's twenty cells, which are one family of tests."""
    return levels([welch_ratio(ours(at, c, metric).values(), published(c, metric).values()) for c in cells(task)])


def level_table(at: Folders, task: str) -> str:
    """Return a task's headline metric: the published seeds, ours, and whether they agree."""
    metric, rows = HEADLINES[task], []
    for cell, level in zip(cells(task), family(at, task, metric), strict=True):
        seeds = " ".join(figures_of(v, 3) for v in published(cell, metric).values())
        own = figures_of(geometric_mean(ours(at, cell, metric).values()), 3)
        tests = [p_words(level.p_value), p_words(level.p_near)]
        rows.append([cell.mode, cell.network, cell.loss.upper(), seeds, own, str(level.ratio), *tests, level.verdict])
    head = "mode | network | trained with | published seeds | ours | ours / published | p of 1 | p within 1.5 | verdict"
    return table(head, rows, left=3)


WORDS = ("reproduced", "differs, within 1.5", "differs", "cannot tell")


def count_table(at: Folders) -> str:
    """Return how many of the twenty cells each verdict holds of, for each metric of the record."""
    rows = []
    for task, metric in COMPARED:
        found = Counter(level.verdict for level in family(at, task, metric))
        rows.append([task, metric, *(str(found[word]) for word in WORDS)])
    return table(f"task | metric | {' | '.join(WORDS)}", rows, left=2)


def cells_of(at: Folders, word: str) -> str:
    """Return of how many cells a verdict holds, over all metrics of the record."""
    return str(sum(level.verdict == word for task, metric in COMPARED for level in family(at, task, metric)))


CLAIM_WORDS = ("holds", "reversed", "artefact", "cannot tell")


def theirs(cell: Cell, metric: str, mended: Collection[str] = ()) -> Values:
    """Return the published values: a source of claims, of which nothing can be mended."""
    return published(cell, metric)


def claim_table(at: Folders) -> str:
    """Return the report's five claims, what its own seeds and our comparisons say, and what is left of each."""
    rows = []
    for claim in CLAIMS:
        own = [r for pair in claim.pairs if (r := published_ratio(pair, theirs)) is not None]
        sides = [side(r, p) for r, p in zip(own, holm([r.p_value for r in own]), strict=True)]
        found = [compare(pair, partial(ours, at)) for pair in claim.pairs]
        words = claim_verdicts(found, claim.ties_hold)
        verdict = claim_verdict(words, [c.causes for c in found])
        published_says = f"{sides.count(1)} for, {sides.count(-1)} against, of {len(sides)}"
        rows.append([claim.text, published_says, *(str(words.count(w)) for w in CLAIM_WORDS), verdict])
    return table(f"claim | its own seeds | {' | '.join(f'ours: {w}' for w in CLAIM_WORDS)} | verdict", rows, left=2)


def comparison_table(at: Folders, numbers: Iterable[int]) -> str:
    """Return each comparison of some claims: A / B as published, ours by that protocol and mended."""
    rows = []
    for k in numbers:
        found = [compare(pair, partial(ours, at)) for pair in CLAIMS[k].pairs]
        for pair, c, word in zip(CLAIMS[k].pairs, found, claim_verdicts(found, CLAIMS[k].ties_hold), strict=True):
            own = published_ratio(pair, theirs)
            said = f"{word}: {' and '.join(c.causes)}" if word == "artefact" else word
            rows.append([pair.label, "-" if own is None else str(own), str(c.plain), str(c.mended), said])
    return table("A / B | published | ours by its protocol | ours mended | verdict", rows)


def readout(content: Content, metric: str) -> str:
    """Write a metric of one readout."""
    return format_estimate(mean_ci(values(content, metric)), limits=NOT_NEGATIVE)  # errors and distances, all


def reconstruction_table(at: Folders) -> str:
    """Return the averaged weights' errors beside the last step's."""
    rows = []
    for label, (mode, name) in READOUTS.items():
        found = [
            values(of(at, Cell("reconstruction", "l2", kind, mode), weights), f"l2@zeros/{name}")
            for weights in ("ema", "raw")
            for kind in NETWORKS
        ]
        rows.append([label, *(format_estimate(mean_ci(x), limits=NOT_NEGATIVE) for x in found)])
    return table("mode | concat | film | concat, last step | film, last step", rows)


def start_table(at: Folders) -> str:
    """Return the flow's last step from zeros and from Gaussian draws."""
    solvers = ("euler-1", "euler-2", "euler-4", "euler-9", "dopri5")
    rows = []
    for kind in NETWORKS:
        cell = Cell("reconstruction", "l2", kind, "flow")
        r = scored(at[run_name(cell.task, cell.mode)] / name_of(cell), "raw", "[1, 2, 4, 9]")
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
    for kind in NETWORKS:
        r = of(at, Cell("reconstruction", "l2", kind, "flow"), weights)
        one, nine = (geometric_mean(values(r, f"l2@zeros/euler-{n}")) for n in (1, 9))
        found.append(one / nine)
    return f"{min(found):.2g} to {max(found):.2g}"


def reference(content: Content, name: str, metric: str) -> str:
    """Write what a row without a network scores; a dash where it has no such metric."""
    value = content["references"][name].get(metric)
    if value is None:
        return "-"
    return f"{value:.0e}" if abs(value) < 1e-4 else f"{value:.4g}"


def boundary_table(at: Folders) -> str:
    """Return one checkpoint from both starts, the published metrics beside the right ones."""
    r = of(at, REGRESSION)
    names = ("published_boundary", "boundary", "published_subspace_diagonal", "subspace_diagonal", "l2")
    seeds = [" ".join(figures_of(v, 3) for v in published(REGRESSION, n).values()) for n in (HEADLINES["piecewise"],)]
    seeds += ["-", " ".join(figures_of(v, 3) for v in published(REGRESSION, "subspace_diagonal").values()), "-", "-"]
    rows = [["published, three seeds", *seeds]]
    for label, x0 in (("x0 Gaussian, as published", "gaussian"), ("x0 = 0, as it was trained", "zeros")):
        rows.append([label, *(readout(r, f"{n}@{x0}/direct") for n in names)])
    rows += [[f"reference: {name}", *(reference(r, name, n) for n in names)] for name in ("zero", "linear")]
    return table(f"evaluated from | {' | '.join(names)}", rows)


def boundary_change(at: Folders) -> str:
    """Write how many times as large the boundary share is from Gaussian x0, in the same checkpoints."""
    r = of(at, REGRESSION)
    return str(paired_ratio(*(by_seed(r, f"published_boundary@{x0}/direct") for x0 in ("gaussian", "zeros"))))


WHOLE = {
    "reconstruction": (("RMSE", "l2", "zeros"),),
    "piecewise": (
        ("RMSE", "l2", "zeros"),
        ("boundary", "boundary", "zeros"),
        ("boundary from Gaussian x0", "boundary", "gaussian"),
        ("subspace_diagonal", "subspace_diagonal", "zeros"),
    ),
    "rotation": (
        ("RMSE", "l2", "zeros"),
        ("perpendicular", "perpendicular", "zeros"),
        ("absolute cosine", "cosine", "zeros"),
    ),
}


def whole_table(at: Folders, task: str) -> str:
    """Return a task's table: a row for each mode and loss, a column for each (heading, metric, x0) and network."""
    rows = []
    for loss, (label, (mode, name)) in product(LOSSES, READOUTS.items()):
        found = {kind: of(at, Cell(task, loss, kind, mode)) for kind in NETWORKS}
        row = [readout(found[kind], f"{metric}@{x0}/{name}") for _, metric, x0 in WHOLE[task] for kind in NETWORKS]
        rows.append([label, loss.upper(), *row])
    one = of(at, Cell(task, "l2", "concat", "regression"))
    for name in ("zero", "nearest", "linear", "cubic_spline", "gaussian_process"):
        row = [reference(one, name, metric) for _, metric, _ in WHOLE[task] for _ in NETWORKS]
        rows.append([f"reference: {name}", "", *row])
    head = " | ".join(f"{heading}, {kind}" for heading, _, _ in WHOLE[task] for kind in NETWORKS)
    return table(f"mode | trained with | {head}", rows, left=2).replace("|  |", "| |")


def hours(at: Folders) -> str:
    """Write what all sweeps and their tests took, each on one core."""
    names = names_of(*TASKS)
    stamps = [json.loads((at[name].parents[1] / f"stamps/{name}.json").read_text()) for name in names]
    return f"{sum(s['seconds'] for s in stamps) / 3600:.1f} hours"


def linear_error(at: Folders) -> str:
    """Write the error of straight lines between the points."""
    r = of(at, Cell("reconstruction", "l2", "concat", "regression"))
    return figures_of(r["references"]["linear"]["l2"], 4)


def drawing(at: Folders) -> str:
    """Draw every seed of the headline metrics, published and ours."""
    figure, axes = new_figure(1, 3, size=(11.0, 6.0), sharey=True)
    for ax, task in zip(axes[0], TASKS, strict=True):
        metric = HEADLINES[task]
        for y, cell in enumerate(cells(task)):
            for k, found in enumerate((published(cell, metric), ours(at, cell, metric))):
                label = ("published", "ours, by the published protocol")[k] if y == 0 else None
                x = list(found.values())
                ax.plot(x, [y + 0.3 * k - 0.15] * len(x), MARKERS[k], color=COLOURS[k], markersize=4, label=label)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_title(f"{task}: {metric}")
    shown = [f"{c.mode}, {c.network}, {c.loss.upper()}" for c in cells(TASKS[0])]
    axes[0, 0].set_yticks(range(len(shown)), shown)
    axes[0, 0].set_ylim(len(shown) - 0.5, -0.5)
    figure.suptitle("each seed: the last step's weights, one network evaluation (mip: two)", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    path = at[run_name(TASKS[0], MODES[0])] / "published_numbers.png"
    figure.savefig(path, dpi=110)
    return str(path)


RECIPE = Recipe(
    name="published",
    runs=tuple(run_of(task, mode) for task, mode in product(TASKS, MODES)),
    figures=entries(names_of(*TASKS), {"published_numbers": drawing}),
    tables=(
        *entries(names_of("reconstruction"), {"flow.reconstruction": reconstruction_table}),
        *entries([run_name("reconstruction", "flow")], {"flow.start_distribution": start_table}),
        *entries([run_name("piecewise", "regression")], {"flow.boundary": boundary_table}),
        *(
            entry
            for t in TASKS
            for entry in entries(
                names_of(t),
                {
                    f"published.levels.{t}": partial(level_table, task=t),
                    f"published.{t}": partial(whole_table, task=t),
                },
            )
        ),
        *entries(
            names_of(*TASKS),
            {
                "published.counts": count_table,
                "published.claims": claim_table,
                "published.comparisons": partial(comparison_table, numbers=(0, 1, 3, 4)),
            },
        ),
    ),
    numbers=(
        *entries([run_name("reconstruction", "regression")], {"flow.linear": linear_error}),
        *entries(
            [run_name("reconstruction", "flow")],
            {
                "flow.nine_steps": partial(nine_steps, weights="raw"),
                "flow.nine_steps.averaged": partial(nine_steps, weights="ema"),
            },
        ),
        *entries([run_name("piecewise", "regression")], {"published.boundary": boundary_change}),
        *entries(
            names_of(*TASKS),
            {
                "published.hours": hours,
                "published.reproduced": partial(cells_of, word="reproduced"),
                "published.undecided": partial(cells_of, word="cannot tell"),
            },
        ),
    ),
)
