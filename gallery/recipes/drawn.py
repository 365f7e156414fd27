"""flow_vs_regression on drawn targets: is the demo's finding one of its target, its grid, and its noiseless points?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from statistics import fmean

from gallery.read import Content, entries, figures_of, results, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.verdicts import Ratio, geometric_mean, p_words, paired_ratio
from lightning_toys.stats import holm

CONFIG = "configs/flow_vs_regression/drawn_targets.yaml"
TARGETS = range(8)
TERMS = (3, 8)
# of each run: how the points lie, and their noise
POINTS = {"drawn_grid": "on a grid, no noise", "drawn_random": "random, noise .1"}
WORDS = {"drawn_grid": "--data.sampling grid", "drawn_random": "--data.sampling random --data.noise 0.1"}
# what is divided by regression's error
RIVALS = {
    "flow": "flow",
    "linear": "straight lines",
    "cubic_spline": "cubic spline",
    "gaussian_process": "Gaussian process",
}


def run_of(name: str) -> Run:
    """Return the run of one kind of points: both modes on every target."""
    commands = tuple(
        f"sweep -c {CONFIG} --grid.model.mode '[regression,flow]' --grid.data.target.phase_seed '[{k}]' "
        f"--data.target.frequency_seed {k} --grid.data.target.components '[{','.join(map(str, TERMS))}]' "
        f"{WORDS[name]} --run.variant {name} --sweep.jobs 2"
        for k in TARGETS
    )
    return Run(
        name=name,
        commands=commands,
        folder=f"flow_vs_regression/{name}",
        seeds="0 to 3",
        minutes=16,
        quick=None,
        keeps=True,
    )


RUNS = tuple(run_of(name) for name in POINTS)


def cell(at: Folders, run: str, mode: str, target: int, terms: int) -> Content:
    """Return a cell's test."""
    return results(at[run] / f"mode={mode},phase_seed={target},components={terms}", "test")


def errors(at: Folders, run: str, terms: int) -> dict[str, dict[int, float]]:
    """Return the error of regression and of each rival by target: l2, its mean over the four seeds."""
    out: dict[str, dict[int, float]] = {name: {} for name in ("regression", *RIVALS)}
    for k in TARGETS:
        tests = {mode: cell(at, run, mode, k, terms) for mode in ("regression", "flow")}
        for name, found in out.items():
            content = tests.get(name)
            found[k] = tests["flow"]["references"][name]["l2"] if content is None else fmean(values(content, "l2"))
    return out


def ratios(at: Folders) -> dict[tuple[str, int, str], Ratio]:
    """Return rival / regression, paired by target, by run, terms and rival."""
    out = {}
    for run, terms in product(POINTS, TERMS):
        found = errors(at, run, terms)
        for name in RIVALS:
            out[run, terms, name] = paired_ratio(found[name], found["regression"])
    return out


def adjusted(found: Mapping[tuple[str, int, str], Ratio]) -> dict[tuple[str, int, str], float]:
    """Return the p-values of all ratios, which are one family, by Holm's rule."""
    return dict(zip(found, holm([r.p_value for r in found.values()]).tolist(), strict=True))


def sign(ratio: Ratio, p: float) -> str:
    """Return ``+`` where a rival's error is shown to be greater than regression's, ``-`` smaller, else ``?``."""
    return "?" if p >= 0.05 else "+" if ratio.log > 0 else "-"


def study_table(at: Folders) -> str:
    """Return regression's error and the rivals' ratios to it; all of the ratios are one family."""
    found, rows = ratios(at), []
    p_values = adjusted(found)
    for run, terms in product(POINTS, TERMS):
        own = geometric_mean(errors(at, run, terms)["regression"].values())
        keys = [(run, terms, name) for name in RIVALS]
        words = [f"{found[k]} {sign(found[k], p_values[k])}" for k in keys]
        rows.append([POINTS[run], str(terms), figures_of(own, 2), *words])
    return table(f"points | terms | regression: l2 | {' | '.join(RIVALS.values())}", rows)


def flow_p(at: Folders) -> str:
    """Return the adjusted p-values of flow / regression, in the table's order."""
    *first, last = [p_words(p) for (_, _, name), p in adjusted(ratios(at)).items() if name == "flow"]
    return f"{', '.join(first)} and {last}"


def counts(at: Folders) -> str:
    """Return on how many targets of each kind the flow's error is the greater one, in the table's order."""
    greater = []
    for run, terms in product(POINTS, TERMS):
        found = errors(at, run, terms)
        greater.append(str(sum(math.log(found["flow"][k] / found["regression"][k]) > 0 for k in TARGETS)))
    *first, last = greater
    return f"{', '.join(first)} and {last} of {len(TARGETS)}"


RECIPE = Recipe(
    name="drawn",
    runs=RUNS,
    tables=entries([run.name for run in RUNS], {"flow.drawn": study_table}),
    numbers=entries([run.name for run in RUNS], {"flow.drawn.counts": counts, "flow.drawn.p": flow_p}),
)
