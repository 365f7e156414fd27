"""flow_vs_regression: which objective reaches regression's error, in how many network evaluations?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from gallery.read import Content, by_seed, entries, figures_of, results, table, values
from gallery.recipe import Folders, Recipe, Run
from gallery.verdicts import Ratio, geometric_mean, paired_ratio
from lightning_toys.plotting import COLOURS, GREY, MARKERS, new_figure
from lightning_toys.stats import geometric_ci, holm

BASELINE = "Regression"
# of each objective its readout by n network evaluations, for n = 1, 2, 4; AuthorsMIP has a first step and a second
READOUTS = {
    BASELINE: {1: "direct"},
    "AuthorsMIP": {1: "one-step", 2: "two-step"},
    **{
        name: {n: f"{solver}-{n}" for n in (1, 2, 4)}
        for name, solver in {
            "Flow": "euler",
            "VPrediction": "ddim",
            "XPrediction": "ddim",
            "ConsistencyTraining": "consistency",
            "Shortcut": "jumps",
            "MeanFlow": "jumps",
            "LagrangianFlowMap": "jumps",
        }.items()
    },
}
OBJECTIVES = tuple(READOUTS)
POINTS, NOISES = (10, 20, 50, 200), ("0", "0.1")
RATES = ("0.0001", "0.0003", "0.001", "0.003", "0.01")
# the rate of each objective: that of the least error in the search, which :func:`chosen` checks against it
CHOSEN = dict.fromkeys(OBJECTIVES, "0.003") | {"Regression": "0.0003", "ConsistencyTraining": "0.001"}
CONFIG = "configs/flow_vs_regression/few_steps.yaml"
ALIKE = 1.25  # ratios within this factor of 1 are called alike, where that is shown

SEARCH = Run(
    name="few_steps_rates",
    commands=(
        f"sweep -c {CONFIG} --grid.model.objective '[{','.join(OBJECTIVES)}]' --grid.model.lr '[{','.join(RATES)}]' "
        f"--grid.data.noise '[{','.join(NOISES)}]' --model.seeds '[100,101,102,103]' --run.variant few_steps_rates "
        "--sweep.jobs 2",
    ),
    folder="flow_vs_regression/few_steps_rates",
    seeds="100 to 103",
    minutes=30,
    quick=None,
    keeps=True,
)


def sweep_of(objective: str) -> str:
    """Return the command of one objective's eight cells."""
    return (
        f"sweep -c {CONFIG} --grid.model.objective '[{objective}]' --model.lr {CHOSEN[objective]} "
        f"--grid.data.num_train '[{','.join(map(str, POINTS))}]' --grid.data.noise '[{','.join(NOISES)}]' "
        "--run.variant few_steps --sweep.jobs 2"
    )


FEW_STEPS = Run(
    name="few_steps",
    commands=tuple(sweep_of(name) for name in OBJECTIVES),
    folder="flow_vs_regression/few_steps",
    seeds="0 to 7",
    minutes=120,
    quick=None,
    keeps=True,
)


def errors(content: Content, readout: str) -> dict[int, float]:
    """Return the error from x0 = 0 by seed."""
    return by_seed(content, f"l2@zeros/{readout}")


# the search for rates


def score(at: Folders, objective: str, rate: str) -> float:
    """Return what the search compares: the geometric mean of the error over seeds, noises and readouts."""
    found: list[float] = []
    for noise in NOISES:
        content = results(at[SEARCH.name] / f"objective={objective},lr={rate},noise={noise}", "test")
        for readout in READOUTS[objective].values():
            found += values(content, f"l2@zeros/{readout}")
    return geometric_mean(found)


def rates_table(at: Folders) -> str:
    """Return the search's scores.

    Raises:
        ValueError: an objective's rate is not that of the least.
    """
    rows = []
    for name in OBJECTIVES:
        scores = {rate: score(at, name, rate) for rate in RATES}
        best = min(scores, key=scores.__getitem__)
        if best != CHOSEN[name]:
            raise ValueError(f"{name}: the search chose {best}, the recipe has {CHOSEN[name]}")
        rows.append([name, *(figures_of(s, 3) for s in scores.values()), best])
    return table(f"objective | {' | '.join(RATES)} | chosen", rows)


# the study


def cell(at: Folders, objective: str, points: int, noise: str) -> Content:
    """Return a cell's test."""
    return results(at[FEW_STEPS.name] / f"objective={objective},num_train={points},noise={noise}", "test")


def ratios(at: Folders) -> dict[tuple[str, int, int, str], Ratio]:
    """Return error / regression's, paired by seed, by objective, evaluations, points and noise."""
    out = {}
    for noise, points in product(NOISES, POINTS):
        base = errors(cell(at, BASELINE, points, noise), "direct")
        for name in OBJECTIVES[1:]:
            content = cell(at, name, points, noise)
            for n, readout in READOUTS[name].items():
                out[name, n, points, noise] = paired_ratio(errors(content, readout), base)
    return out


def verdicts(found: dict[tuple[str, int, int, str], Ratio]) -> dict[tuple[str, int, int, str], str]:
    """Return a sign for each ratio, all of them one family by Holm's rule.

    ``+`` greater than regression's error, ``-`` smaller, ``=`` within a factor of 1.25 (two one-sided tests), ``?``
    none of these could be shown.
    """
    differs = holm([r.p_value for r in found.values()])
    alike = holm([r.within(ALIKE) for r in found.values()])
    out = {}
    for (key, r), p, near in zip(found.items(), differs, alike, strict=True):
        out[key] = "=" if near < 0.05 else ("+" if r.log > 0 else "-") if p < 0.05 else "?"
    return out


def study_table(at: Folders) -> str:
    """Return regression's error, and for each objective and number of evaluations the ratio to it."""
    cells = list(product(NOISES, POINTS))
    found = ratios(at)
    signs = verdicts(found)
    row = [figures_of(geometric_mean(errors(cell(at, BASELINE, n, s), "direct").values()), 2) for s, n in cells]
    rows = [[f"{BASELINE}: l2", "1", *row]]
    for name in OBJECTIVES[1:]:
        for n in READOUTS[name]:
            keys = [(name, n, points, noise) for noise, points in cells]
            rows.append([name, str(n), *(f"{figures_of(found[k].value, 2)} {signs[k]}" for k in keys)])
    heads = [f"{points} points, noise {noise}" for noise, points in cells]
    return table(f"objective | evaluations | {' | '.join(heads)}", rows)


def counts(at: Folders) -> str:
    """Return in how many of the eight cells an objective's error is shown to be greater, alike or smaller."""
    signs = verdicts(ratios(at))
    rows = []
    for name in OBJECTIVES[1:]:
        for n in READOUTS[name]:
            found = [sign for (who, k, _, _), sign in signs.items() if (who, k) == (name, n)]
            rows.append([name, str(n), *(str(found.count(sign)) for sign in "-=+?")])
    return table("objective | evaluations | smaller | within 1.25 | greater | cannot tell", rows)


VELOCITIES = ("Flow", "VPrediction", "Shortcut", "MeanFlow", "LagrangianFlowMap", "ConsistencyTraining")


def span(at: Folders, names: Sequence[str], evaluations: Sequence[int], points: Sequence[int], noise: str) -> str:
    """Write the least and the greatest ratio among some objectives, evaluations and numbers of points."""
    keys = set(product(names, evaluations, points, [noise]))
    found = [r.value for key, r in ratios(at).items() if key in keys]
    low, high = figures_of(min(found), 2), figures_of(max(found), 2)
    return f"{low} to {high}"


def signs_of(at: Folders, sign: str, names: Sequence[str], points: Sequence[int], noises: Sequence[str]) -> str:
    """Write how many comparisons have a sign, of how many."""
    found = [
        s for (who, _, n, noise), s in verdicts(ratios(at)).items() if who in names and n in points and noise in noises
    ]
    return f"{found.count(sign)} of {len(found)}"


def drawing(at: Folders) -> str:
    """Draw the error against the number of points, a panel for each noise and number of evaluations."""
    figure, axes = new_figure(2, 3, size=(11.0, 7.0), sharey="row", sharex=True)
    lines: dict[str, Line2D] = {}
    for (i, noise), (j, n) in product(enumerate(NOISES), enumerate((1, 2, 4))):
        ax = axes[i, j]
        for k, name in enumerate(OBJECTIVES):
            readout = READOUTS[name].get(1 if name == BASELINE else n)
            if readout is None:
                continue
            estimates = [geometric_ci(list(errors(cell(at, name, N, noise), readout).values())) for N in POINTS]
            shift = 1 + 0.02 * (k - len(OBJECTIVES) / 2)  # so that bars stand side by side
            x, kept = [N * shift for N in POINTS], [e for e in estimates if e is not None]
            assert len(kept) == len(POINTS)
            y = [e.mean for e in kept]
            bars = [[e.mean - e.lo for e in kept], [e.hi - e.mean for e in kept]]
            colour, style = (GREY, "--") if name == BASELINE else (COLOURS[(k - 1) % len(COLOURS)], "-")
            drawn = ax.errorbar(x, y, bars, color=colour, linestyle=style, marker=MARKERS[k % len(MARKERS)], ms=4, lw=1)
            lines.setdefault(name, drawn.lines[0])
        ax.set(xscale="log", yscale="log", title=f"noise {noise}, {n} evaluation{'s' if n > 1 else ''}")
        ax.set_xticks(POINTS, [str(N) for N in POINTS])
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        if i == 1:
            ax.set_xlabel("training points")
        if j == 0:
            ax.set_ylabel("l2, geometric mean, 95 % interval")
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=5, frameon=False)
    path = Path(at[FEW_STEPS.name]) / "few_steps.png"
    figure.savefig(path, dpi=110)
    return str(path)


RECIPE = Recipe(
    name="few_steps",
    runs=(SEARCH, FEW_STEPS),
    figures=entries([FEW_STEPS.name], {"few_steps": drawing}),
    tables=(
        *entries([SEARCH.name], {"flow.few_steps.rates": rates_table}),
        *entries([FEW_STEPS.name], {"flow.few_steps": study_table, "flow.few_steps.counts": counts}),
    ),
    numbers=entries(
        [FEW_STEPS.name],
        {
            "flow.few_steps.smaller": lambda at: signs_of(at, "-", OBJECTIVES, POINTS, NOISES),
            "flow.few_steps.one": lambda at: span(at, VELOCITIES, [1], [50, 200], "0"),
            "flow.few_steps.one_greater": lambda at: signs_of(at, "+", VELOCITIES, [50, 200], ["0"]),
            "flow.few_steps.x": lambda at: span(at, ["XPrediction"], [1, 2, 4], POINTS, "0"),
            "flow.few_steps.x_greater": lambda at: signs_of(at, "+", ["XPrediction"], POINTS, NOISES),
            "flow.few_steps.map": lambda at: span(at, ["LagrangianFlowMap"], [4], POINTS, "0"),
            "flow.few_steps.noisy": lambda at: span(at, OBJECTIVES, [1, 2, 4], [20, 50], "0.1"),
            "flow.few_steps.noisy_greater": lambda at: signs_of(at, "+", OBJECTIVES, [20, 50], ["0.1"]),
            "flow.few_steps.noisy_alike": lambda at: signs_of(at, "=", OBJECTIVES, [20, 50], ["0.1"]),
        },
    ),
)
