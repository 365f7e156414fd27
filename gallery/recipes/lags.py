"""bilevel's regression, tuned alike: does learning the weights of lags pay?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from gallery.read import (
    Content,
    Make,
    adjusted,
    between,
    by_seed,
    difference,
    entries,
    figures_of,
    results,
    short,
    table,
    values,
)
from gallery.recipe import Folders, Recipe, Run
from lightning_toys.plotting import ACROSS, COLOURS, GREY, blocks
from lightning_toys.stats import PairedDifference, format_estimate, mean_ci

SETTINGS = {
    "regression": "shipped",
    "regression_noisy": "three times the noise",
    "regression_long": "six times as long",
    "regression_slow": "a period of 126",
    "regression_switching": "the period switches",
}
SHORT, LONG = ("regression", "regression_noisy", "regression_slow"), ("regression_long", "regression_switching")
LEARNED = ("funcbo", "aid", "unroll1")
PLAIN = ("lag_1", "optimum", "least_squares", "uniform", "no_tracking")
METHODS = (*LEARNED, *PLAIN, "fixed")
WINDOWS = ("[1,1]", "[1,1,1,1]", "[3,2,1]")
INNER, OUTER = ("1e-3", "3e-3", "1e-2"), ("0.03", "0.1", "0.3")
TUNING, SCORED = "[100,101,102,103]", "[10,11,12,13,14,15,16,17]"
# of each setting and method its inner rate, and its outer rate or its window; what the search says, see check_rates
CHOSEN: dict[str, dict[str, tuple[str, str]]] = {
    "regression": {
        "funcbo": ("1e-2", "0.3"),
        "aid": ("1e-2", "0.3"),
        "unroll1": ("1e-2", "0.3"),
        "lag_1": ("1e-2", ""),
        "optimum": ("1e-2", ""),
        "least_squares": ("1e-2", ""),
        "uniform": ("1e-2", ""),
        "no_tracking": ("1e-2", ""),
        "fixed": ("1e-2", "[1,1]"),
    },
    "regression_noisy": {
        "funcbo": ("1e-2", "0.3"),
        "aid": ("1e-2", "0.3"),
        "unroll1": ("1e-2", "0.3"),
        "lag_1": ("1e-2", ""),
        "optimum": ("1e-2", ""),
        "least_squares": ("1e-2", ""),
        "uniform": ("1e-2", ""),
        "no_tracking": ("1e-2", ""),
        "fixed": ("3e-3", "[1,1]"),
    },
    "regression_long": {
        "funcbo": ("3e-3", "0.1"),
        "aid": ("3e-3", "0.1"),
        "unroll1": ("3e-3", "0.3"),
        "lag_1": ("3e-3", ""),
        "optimum": ("3e-3", ""),
        "least_squares": ("3e-3", ""),
        "uniform": ("1e-2", ""),
        "no_tracking": ("1e-2", ""),
        "fixed": ("3e-3", "[1,1]"),
    },
    "regression_slow": {
        "funcbo": ("1e-2", "0.3"),
        "aid": ("1e-2", "0.3"),
        "unroll1": ("1e-2", "0.3"),
        "lag_1": ("1e-2", ""),
        "optimum": ("1e-2", ""),
        "least_squares": ("1e-2", ""),
        "uniform": ("1e-2", ""),
        "no_tracking": ("1e-2", ""),
        "fixed": ("1e-2", "[1,1]"),
    },
    "regression_switching": {
        "funcbo": ("1e-2", "0.1"),
        "aid": ("1e-2", "0.3"),
        "unroll1": ("3e-3", "0.3"),
        "lag_1": ("1e-2", ""),
        "optimum": ("1e-2", ""),
        "least_squares": ("1e-2", ""),
        "uniform": ("1e-2", ""),
        "no_tracking": ("1e-2", ""),
        "fixed": ("1e-2", "[1,1]"),
    },
}
EVERY = "--figures.enabled false"
QUICK = "--trainer.max_steps 250"


def configs(settings: Sequence[str]) -> str:
    """Return the words that make a grid of configurations."""
    return f"--grid.config '[{','.join(f'configs/bilevel/{s}.yaml' for s in settings)}]'"


def searches(grids: Sequence[str], variant: str) -> tuple[str, ...]:
    """Return the commands of a search: the long streams' at half of their length."""
    out = []
    for settings, more in ((SHORT, ""), (LONG, " --trainer.max_steps 1500")):
        for word in grids:
            out.append(
                f"sweep {configs(settings)} {word} --model.seeds '{TUNING}' {EVERY}{more} --run.variant {variant}"
            )
    return tuple(out)


def grid(**found: Sequence[str]) -> str:
    """Return the words of a grid over settings of the model."""
    return " ".join(f"--grid.model.{name} '[{','.join(x)}]'" for name, x in found.items())


RATES_LEARNED = Run(
    name="lags_rates_learned",
    commands=searches(
        (grid(algorithm=LEARNED, inner_lr=INNER, outer_lr=OUTER),),
        "lags_rates_learned",
    ),
    folder="bilevel/lags_rates_learned",
    seeds="100 to 103",
    minutes=25,
    quick=None,
    keeps=True,
    may_diverge=True,
)
RATES_CONTROLS = Run(
    name="lags_rates_controls",
    commands=searches(
        (
            grid(algorithm=PLAIN, inner_lr=INNER),
            grid(algorithm=["fixed"], inner_lr=INNER, fixed_weights=WINDOWS),
        ),
        "lags_rates_controls",
    ),
    folder="bilevel/lags_rates_controls",
    seeds="100 to 103",
    minutes=12,
    quick=None,
    keeps=True,
    may_diverge=True,
)


def run_name(setting: str) -> str:
    """Return the name of a setting's run.

    >>> run_name("regression"), run_name("regression_slow")
    ('lags_shipped', 'lags_slow')
    """
    return f"lags_{setting.removeprefix('regression').lstrip('_') or 'shipped'}"


def fit_of(setting: str, name: str) -> str:
    """Return the command of one method's fit in one setting, with what the search chose."""
    inner, other = CHOSEN[setting][name]
    more = f" --model.outer_lr {other}" if name in LEARNED else f" --model.fixed_weights '{other}'" if other else ""
    words = f"-c configs/bilevel/{setting}.yaml --model.algorithm {name} --model.inner_lr {inner}{more}"
    return f"fit {words} --model.seeds '{SCORED}' {EVERY} --run.variant {run_name(setting)} --run.name {name}"


def study(setting: str, minutes: float) -> Run:
    """Return the run of every method in one setting."""
    return Run(
        name=run_name(setting),
        commands=tuple(fit_of(setting, name) for name in METHODS),
        folder=f"bilevel/{run_name(setting)}",
        seeds="10 to 17",
        minutes=minutes,
        quick=QUICK if setting == "regression" else None,  # that one is in README's picture
        keeps=True,
        may_diverge=True,
    )


STUDIES = tuple(study(s, m) for s, m in zip(SETTINGS, (1.5, 1.5, 6, 2, 6), strict=True))


# the search

SCORE = "outer_loss_all"


def tried(setting: str, name: str) -> list[tuple[str, str]]:
    """Return what the search tried of a method: inner rate, and outer rate or window."""
    others = OUTER if name in LEARNED else WINDOWS if name == "fixed" else ("",)
    return list(product(INNER, others))


def search_cell(at: Folders, setting: str, name: str, pair: tuple[str, str]) -> Content | None:
    """Return a cell of the search; None where its training went non-finite."""
    inner, other = pair
    run = RATES_LEARNED if name in LEARNED else RATES_CONTROLS
    key = "outer_lr" if name in LEARNED else "fixed_weights"
    more = f",{key}={other}" if other else ""
    return finished(at[run.name] / f"config={setting},algorithm={name},inner_lr={inner}{more}")


def finished(folder: Path) -> Content | None:
    """Return the results of a cell; None where its training went non-finite, so that it has none.

    Raises:
        FileNotFoundError: there is no such cell.
    """
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder.parent} is not there")
    try:
        return results(folder, "fit")
    except FileNotFoundError:
        return None


def mean_score(content: Content | None) -> float:
    """Return what a search compares; infinite where a seed has no finite loss."""
    if content is None:
        return float("inf")
    found = values(content, SCORE)
    return float(np.mean(found)) if len(found) == len(content["seeds"]) else float("inf")


def best_of(scores: Mapping[tuple[str, str], float]) -> tuple[str, str]:
    """Return the pair of the least score.

    Raises:
        ValueError: none of them is finite: nothing ended, or nothing is there.
    """
    if not np.isfinite(list(scores.values())).any():
        raise ValueError(f"the search has no finite score at any of {', '.join(map(str, scores))}")
    return min(scores, key=lambda k: scores[k])


def found_rates(at: Folders) -> dict[str, dict[str, tuple[str, str]]]:
    """Return what the search says."""
    return {
        s: {n: best_of({p: mean_score(search_cell(at, s, n, p)) for p in tried(s, n)}) for n in METHODS}
        for s in SETTINGS
    }


def written(pair: tuple[str, str], tries: Sequence[tuple[str, str]]) -> str:
    """Write a pair of rates; a star where one is the least or the greatest of those tried."""
    words = []
    for value, every in zip(pair, zip(*tries, strict=True), strict=True):
        if not value:
            continue
        edge = not value.startswith("[") and float(value) in (min(map(float, every)), max(map(float, every)))
        words.append(short(f"{float(value):g}") + ("*" if edge else "") if not value.startswith("[") else f"`{value}`")
    return ", ".join(words)


def check_rates(at: Folders) -> dict[str, dict[str, tuple[str, str]]]:
    """Return what the search says.

    Raises:
        ValueError: that is not what the study runs with.
    """
    found = found_rates(at)
    for s, n in product(SETTINGS, METHODS):
        if found[s][n] != CHOSEN[s][n]:
            raise ValueError(f"{s}, {n}: the search chose {found[s][n]}, the recipe has {CHOSEN[s][n]}")
    return found


def rates_table(at: Folders) -> str:
    """Return the rates chosen."""
    found = check_rates(at)
    rows = [[n, *(written(found[s][n], tried(s, n)) for s in SETTINGS)] for n in METHODS]
    return table(f"method | {' | '.join(SETTINGS.values())}", rows)


# the study

SHORT_WINDOWS = ("lag_1", "fixed")  # that learning has to be better than
OVER = (*SHORT_WINDOWS, "optimum", "least_squares")
FAILED = "went non-finite"


def cell(at: Folders, setting: str, name: str) -> Content | None:
    """Return a method's results in a setting; None where its training went non-finite."""
    return finished(at[run_name(setting)] / name)


def comparisons(at: Folders) -> dict[tuple[str, str, str, str], PairedDifference]:
    """Return every difference of the page by setting, method, baseline and metric, each pair once.

    What went non-finite is compared with nothing.

    Raises:
        ValueError: as :func:`check_rates`.
    """
    check_rates(at)
    out = {}
    for setting in SETTINGS:
        by = {name: cell(at, setting, name) for name in METHODS}
        for metric, (k, base), name in product((SCORE, "outer_loss"), enumerate(OVER), METHODS):
            one, other = by[name], by[base]
            if one is not None and other is not None and name != base and name not in OVER[:k]:
                out[setting, name, base, metric] = difference(one, other, metric)
    return out


def p_values(at: Folders) -> dict[tuple[str, str, str, str], float]:
    """Return the p-values of all of them, adjusted by Holm as one family."""
    found = comparisons(at)
    return dict(zip(found, adjusted(found.values()), strict=True))


def signed(d: PairedDifference, p: float) -> str:
    """Write a difference, in bold type where p < .05."""
    text = short(format_estimate(d.estimate))
    return f"**{text}**" if p < 0.05 else text


def study_table(at: Folders, setting: str) -> str:
    """Return every method in one setting."""
    found, p = comparisons(at), p_values(at)
    rows = []
    for name in METHODS:
        content = cell(at, setting, name)
        if content is None:
            rows.append([name, FAILED, *[""] * (len(OVER) + 2)])
            continue
        row = [name, *(short(format_estimate(mean_ci(values(content, m)))) for m in (SCORE, "outer_loss"))]
        for base in OVER:
            key = (setting, name, base, SCORE)
            row.append(signed(found[key], p[key]) if key in found else "")
        row.append(" ".join(figures_of(v, 3) for v in values(content, SCORE)))
        rows.append(row)
    minus = " | ".join(f"minus {base}" for base in OVER)
    return table(f"method | whole stream | last sixth | {minus} | each seed", rows)


def verdict_of(gaps: Sequence[tuple[PairedDifference, float]]) -> str:
    """Return the verdict on a method by its differences from both short windows, and their p.

    >>> from lightning_toys.stats import paired_difference
    >>> lower = paired_difference({0: 1.0, 1: 1.1, 2: 1.0}, {0: 2.0, 1: 2.0, 2: 2.1})
    >>> [verdict_of([(lower, p), (lower, q)]) for p, q in ((0.01, 0.02), (0.01, 0.2), (0.3, 0.2))]
    ['pays', 'no significant difference', 'no significant difference']
    """
    below = [p < 0.05 and d.estimate.mean < 0 for d, p in gaps]
    above = [p < 0.05 and d.estimate.mean > 0 for d, p in gaps]
    return "pays" if all(below) else "costs" if any(above) else "no significant difference"


def verdict_table(at: Folders) -> str:
    """Return whether each learner pays on each stream: its differences from both short windows, p and the verdict."""
    found, p = comparisons(at), p_values(at)
    rows = []
    for (setting, label), name in product(SETTINGS.items(), (*LEARNED, "least_squares")):
        gaps = {m: [(setting, name, base, m) for base in SHORT_WINDOWS] for m in (SCORE, "outer_loss")}
        if not all(k in found for k in gaps[SCORE]):
            why = FAILED if cell(at, setting, name) is None else f"a baseline {FAILED}"
            rows.append([label, name, why, *[""] * 6])
            continue
        row = [label, name, verdict_of([(found[k], p[k]) for k in gaps[SCORE]])]
        for k in gaps[SCORE]:
            row += [short(format_estimate(found[k].estimate)), short(f"{p[k]:.2g}")]
        rows.append(row + [signed(found[k], p[k]) for k in gaps["outer_loss"]])
    head = "stream | method | verdict | minus lag_1 | p | minus fixed | p | last sixth: minus lag_1 | minus fixed"
    return table(head, rows, left=3)


def verdicts_of(name: str) -> Make:
    """Return what writes on how many streams a method pays, and on how many it costs."""

    def write(at: Folders) -> str:
        found, p = comparisons(at), p_values(at)
        keys = [[(s, name, base, SCORE) for base in SHORT_WINDOWS] for s in SETTINGS]
        each = [verdict_of([(found[k], p[k]) for k in pair]) for pair in keys if all(k in found for k in pair)]
        return f"pays on {each.count('pays')} and costs on {each.count('costs')} of {len(SETTINGS)} streams"

    return write


def gap(setting: str, name: str, base: str, metric: str = SCORE) -> Make:
    """Return what writes a method's loss minus another's on a stream, and its interval."""
    return lambda at: short(format_estimate(comparisons(at)[setting, name, base, metric].estimate))


def later(name: str, base: str, metric: str) -> Make:
    """Return what writes a difference on the shipped stream that was asked for after the tables were seen."""

    def write(at: Folders) -> str:
        one, other = (cell(at, "regression", n) for n in (name, base))
        assert one is not None
        assert other is not None
        return short(format_estimate(difference(one, other, metric).estimate))

    return write


def optimum_leaves(at: Folders) -> str:
    """Return what share of the last observation's loss the oracle's weights leave, on every stream but the slow one."""
    shares = []
    for setting in SETTINGS:
        one, other = cell(at, setting, "optimum"), cell(at, setting, "lag_1")
        if setting != "regression_slow" and one is not None and other is not None:
            shares.append(100 * mean_score(one) / mean_score(other))
    return f"{between(shares, 0)} %"


def drawing(at: Folders) -> str:
    """Draw each seed's loss over the whole stream minus its loss with lag 1, a panel for each stream."""
    figure, panels = blocks(len(SETTINGS))
    names = [n for n in METHODS if n not in ("lag_1", "uniform", "no_tracking")]  # those two are far off
    found = comparisons(at)
    for (ax,), (setting, label) in zip(panels, SETTINGS.items(), strict=True):
        lag_1 = cell(at, setting, "lag_1")
        base = by_seed(lag_1, SCORE) if lag_1 is not None else {}
        for k, name in enumerate(names):
            content = cell(at, setting, name)
            if content is None or not base:
                continue
            each = by_seed(content, SCORE)
            gaps = [each[s] - base[s] for s in base]
            colour = COLOURS[k]
            ax.plot(k + np.linspace(-0.25, 0.25, len(gaps)), gaps, ".", color=colour, alpha=0.6, markersize=6)
            e = found[setting, name, "lag_1", SCORE].estimate
            ax.errorbar([k], [e.mean], [[e.mean - e.lo], [e.hi - e.mean]], color="black", marker="_", markersize=14)
        ax.axhline(0.0, color=GREY, linestyle="--", linewidth=1)
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_title(label, fontsize=10)
    for (ax,) in panels[::ACROSS]:
        ax.set_ylabel("loss over the stream minus lag_1's:\nseeds; mean, 95 % interval")
    path = at[run_name("regression")] / "lags.png"
    figure.savefig(path, dpi=110)
    return str(path)


RECIPE = Recipe(
    name="lags",
    runs=(RATES_LEARNED, RATES_CONTROLS, *STUDIES),
    figures=entries([run.name for run in (RATES_LEARNED, RATES_CONTROLS, *STUDIES)], {"bilevel_lags": drawing}),
    numbers=entries(
        [run.name for run in (RATES_LEARNED, RATES_CONTROLS, *STUDIES)],
        {
            **{f"lags.verdicts.{n}": verdicts_of(n) for n in (*LEARNED, "least_squares")},
            **{f"lags.{n}.shipped": gap("regression", n, "lag_1") for n in ("unroll1", "least_squares")},
            "lags.unroll1.noisy": gap("regression_noisy", "unroll1", "lag_1"),
            "lags.unroll1.least_squares": gap("regression", "unroll1", "least_squares"),
            "lags.later.whole": later("unroll1", "funcbo", SCORE),
            "lags.later.last": later("unroll1", "funcbo", "outer_loss"),
            "lags.optimum.leaves": optimum_leaves,
            "lags.funcbo.slow": gap("regression_slow", "funcbo", "fixed"),
        },
    ),
    tables=(
        *entries([RATES_LEARNED.name, RATES_CONTROLS.name], {"lags.rates": rates_table}),
        *entries(
            [run.name for run in (RATES_LEARNED, RATES_CONTROLS, *STUDIES)],
            {f"lags.{s}": lambda at, s=s: study_table(at, s) for s in SETTINGS} | {"lags.verdicts": verdict_table},
        ),
    ),
)
