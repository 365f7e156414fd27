"""bilevel's regression, tuned alike: does learning the weights of lags pay?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from gallery.read import Content, adjusted, by_seed, difference, entries, figures_of, results, short, table, values
from gallery.recipe import Folders, Recipe, Run
from lightning_toys.plotting import COLOURS, GREY, new_figure
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
CROSS = tuple(("3e-3", o) for o in OUTER) + tuple((i, "0.1") for i in INNER if i != "3e-3")  # (inner_lr, outer_lr)
FIXED_CROSS = tuple(("3e-3", w) for w in WINDOWS) + tuple((i, "[1,1]") for i in INNER if i != "3e-3")
TUNING, SCORED = "[100,101,102,103]", "[10,11,12,13,14,15,16,17]"
# of each setting and method its inner rate, and its outer rate or its window; what the search says, see rates_table
CHOSEN: dict[str, dict[str, tuple[str, str]]] = {
    "regression": {
        "funcbo": ("3e-3", "0.1"),
        "aid": ("3e-3", "0.1"),
        "unroll1": ("3e-3", "0.1"),
        "lag_1": ("3e-3", ""),
        "optimum": ("3e-3", ""),
        "least_squares": ("3e-3", ""),
        "uniform": ("3e-3", ""),
        "no_tracking": ("3e-3", ""),
        "fixed": ("3e-3", "[1,1]"),
    },
    "regression_noisy": {
        "funcbo": ("3e-3", "0.1"),
        "aid": ("3e-3", "0.1"),
        "unroll1": ("3e-3", "0.1"),
        "lag_1": ("3e-3", ""),
        "optimum": ("3e-3", ""),
        "least_squares": ("3e-3", ""),
        "uniform": ("3e-3", ""),
        "no_tracking": ("3e-3", ""),
        "fixed": ("3e-3", "[1,1]"),
    },
    "regression_long": {
        "funcbo": ("3e-3", "0.1"),
        "aid": ("3e-3", "0.1"),
        "unroll1": ("3e-3", "0.1"),
        "lag_1": ("3e-3", ""),
        "optimum": ("3e-3", ""),
        "least_squares": ("3e-3", ""),
        "uniform": ("3e-3", ""),
        "no_tracking": ("3e-3", ""),
        "fixed": ("3e-3", "[1,1]"),
    },
    "regression_slow": {
        "funcbo": ("3e-3", "0.1"),
        "aid": ("3e-3", "0.1"),
        "unroll1": ("3e-3", "0.1"),
        "lag_1": ("3e-3", ""),
        "optimum": ("3e-3", ""),
        "least_squares": ("3e-3", ""),
        "uniform": ("3e-3", ""),
        "no_tracking": ("3e-3", ""),
        "fixed": ("3e-3", "[1,1]"),
    },
    "regression_switching": {
        "funcbo": ("3e-3", "0.1"),
        "aid": ("3e-3", "0.1"),
        "unroll1": ("3e-3", "0.1"),
        "lag_1": ("3e-3", ""),
        "optimum": ("3e-3", ""),
        "least_squares": ("3e-3", ""),
        "uniform": ("3e-3", ""),
        "no_tracking": ("3e-3", ""),
        "fixed": ("3e-3", "[1,1]"),
    },
}
EVERY = "--figures.enabled false"


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
        (
            grid(algorithm=LEARNED, inner_lr=["3e-3"], outer_lr=OUTER),
            grid(algorithm=LEARNED, inner_lr=["1e-3", "1e-2"], outer_lr=["0.1"]),
        ),
        "lags_rates_learned",
    ),
    folder="bilevel/lags_rates_learned",
    seeds="100 to 103",
    minutes=14,
    quick=None,
    keeps=True,
    may_diverge=True,
)
RATES_CONTROLS = Run(
    name="lags_rates_controls",
    commands=searches(
        (
            grid(algorithm=PLAIN, inner_lr=INNER),
            grid(algorithm=["fixed"], inner_lr=["3e-3"], fixed_weights=WINDOWS),
            grid(algorithm=["fixed"], inner_lr=["1e-3", "1e-2"], fixed_weights=["[1,1]"]),
        ),
        "lags_rates_controls",
    ),
    folder="bilevel/lags_rates_controls",
    seeds="100 to 103",
    minutes=10,
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
        quick=None,
        keeps=True,
        may_diverge=True,
    )


STUDIES = tuple(study(s, m) for s, m in zip(SETTINGS, (1.5, 1.5, 6, 2, 6), strict=True))


# the search

SCORE = "outer_loss_all"


def tried(setting: str, name: str) -> list[tuple[str, str]]:
    """Return what the search tried of a method: inner rate, and outer rate or window."""
    if name in LEARNED:
        return list(CROSS)
    return list(FIXED_CROSS) if name == "fixed" else [(i, "") for i in INNER]


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
    """Return the pair of the least score."""
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


def rates_table(at: Folders) -> str:
    """Return the rates chosen.

    Raises:
        ValueError: those of the recipe are not those of the search.
    """
    found = found_rates(at)
    for s, n in product(SETTINGS, METHODS):
        if found[s][n] != CHOSEN[s][n]:
            raise ValueError(f"{s}, {n}: the search chose {found[s][n]}, the recipe has {CHOSEN[s][n]}")
    rows = [[n, *(written(found[s][n], tried(s, n)) for s in SETTINGS)] for n in METHODS]
    return table(f"method | {' | '.join(SETTINGS.values())}", rows)


# the study

OVER = ("lag_1", "optimum", "least_squares")


def cell(at: Folders, setting: str, name: str) -> Content:
    """Return a method's results in a setting."""
    return results(at[run_name(setting)] / name)


def comparisons(at: Folders) -> dict[tuple[str, str, str, str], PairedDifference]:
    """Return every difference of the page by setting, method, baseline and metric, each pair once."""
    out = {}
    for setting, metric in product(SETTINGS, (SCORE, "outer_loss")):
        for k, base in enumerate(OVER):
            for name in METHODS:
                if name != base and name not in OVER[:k]:
                    found = difference(cell(at, setting, name), cell(at, setting, base), metric)
                    out[setting, name, base, metric] = found
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
        row = [name, *(short(format_estimate(mean_ci(values(content, m)))) for m in (SCORE, "outer_loss"))]
        for base in OVER:
            key = (setting, name, base, SCORE)
            row.append(signed(found[key], p[key]) if key in found else "")
        row.append(" ".join(figures_of(v, 3) for v in values(content, SCORE)))
        rows.append(row)
    return table(
        "method | whole stream | last sixth | minus lag_1 | minus optimum | minus least_squares | each seed", rows
    )


def verdict_table(at: Folders) -> str:
    """Return of each setting and learner whether it pays: its difference from lag_1, p and the verdict."""
    found, p = comparisons(at), p_values(at)
    rows = []
    for setting, label in SETTINGS.items():
        for name in (*LEARNED, "least_squares"):
            keys = [(setting, name, "lag_1", metric) for metric in (SCORE, "outer_loss")]
            d, q = found[keys[0]], p[keys[0]]
            verdict = "no significant difference" if q >= 0.05 else "pays" if d.estimate.mean < 0 else "costs"
            texts = [short(format_estimate(found[k].estimate)) for k in keys]
            rows.append([label, name, texts[0], short(f"{q:.2g}"), verdict, texts[1], short(f"{p[keys[1]]:.2g}")])
    return table(
        "stream | method | whole stream, minus lag_1 | p | verdict | last sixth, minus lag_1 | p", rows, left=2
    )


def drawing(at: Folders) -> str:
    """Draw each seed's loss over the whole stream minus its loss with lag 1, a panel for each stream."""
    figure, axes = new_figure(1, len(SETTINGS), size=(13.0, 4.0))
    names = [n for n in METHODS if n not in ("lag_1", "uniform", "no_tracking")]  # those two are far off
    found = comparisons(at)
    for ax, (setting, label) in zip(axes[0], SETTINGS.items(), strict=True):
        base = by_seed(cell(at, setting, "lag_1"), SCORE)
        for k, name in enumerate(names):
            each = by_seed(cell(at, setting, name), SCORE)
            gaps = [each[s] - base[s] for s in base]
            colour = COLOURS[k]
            ax.plot(k + np.linspace(-0.25, 0.25, len(gaps)), gaps, ".", color=colour, alpha=0.6, markersize=6)
            e = found[setting, name, "lag_1", SCORE].estimate
            ax.errorbar([k], [e.mean], [[e.mean - e.lo], [e.hi - e.mean]], color="black", marker="_", markersize=14)
        ax.axhline(0.0, color=GREY, linestyle="--", linewidth=1)
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_title(label, fontsize=10)
    axes[0, 0].set_ylabel("loss over the stream minus lag_1's:\nseeds; mean, 95 % interval")
    path = at[run_name("regression")] / "lags.png"
    figure.savefig(path, dpi=110)
    return str(path)


RECIPE = Recipe(
    name="lags",
    runs=(RATES_LEARNED, RATES_CONTROLS, *STUDIES),
    tables=(
        *entries([RATES_LEARNED.name, RATES_CONTROLS.name], {"lags.rates": rates_table}),
        *entries(
            [run.name for run in STUDIES],
            {f"lags.{s}": lambda at, s=s: study_table(at, s) for s in SETTINGS} | {"lags.verdicts": verdict_table},
        ),
    ),
)
