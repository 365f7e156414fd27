"""Runs side by side, tuned alike: rates chosen on some seeds, differences from a control on the others.

    python -m lightning_toys.bilevel.paired_table FOLDER ... --over lag_1 --tune 100,101,102,103
    python -m lightning_toys.bilevel.paired_table FOLDER ... --over model.smoothing=1 --tune 100,101,102,103

There is a table for each setting (stream, number of steps, ...), in it a row for each method and metric. Of the runs of
a method that differ in ``--rates`` the one counts that does best on the seeds of ``--tune``; the other seeds are
scored. Differences are paired by seed, with 95 % t intervals; all p-values that are printed are one family (Holm).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

from lightning_toys.bilevel.tuned_runs import (
    ANY,
    Key,
    Run,
    choice,
    chosen,
    differing,
    found_runs,
    groups,
    method_name,
    short_value,
)
from lightning_toys.errors import ToyError, did_you_mean, printable, require
from lightning_toys.stats import (
    Estimate,
    PairedDifference,
    format_estimate,
    geometric_ci,
    holm,
    mean_ci,
    paired_difference,
    paired_ratio,
)

ROWS = "model.algorithm,model.agent,model.smoothing,model.solver.smoothing"
RATES = "model.lr,model.inner_lr,model.outer_lr,model.fixed_weights"
RATIOS = "local_regret,local_regret_all"
LEVEL = 0.05  # of a verdict


@dataclass(frozen=True)
class Question:
    """What is asked of the runs.

    Attributes:
        rows: settings that make a method.
        rates: settings that are chosen for each method.
        metrics: of results.json, in the order of the rows.
        ratios: those of them that are compared by ratios of geometric means.
        over: what each row is compared with: a row's name, or ``SETTING=VALUE``, the same method with that.
        tune: seeds on which rates are chosen.
        choose: the metric that chooses.
        maximize: whether more of it is better.
        unpaired: Welch's test in place of the paired one.
    """

    rows: Sequence[str]
    rates: Sequence[str]
    metrics: Sequence[str]
    ratios: Sequence[str]
    over: Sequence[str]
    tune: Sequence[int]
    choose: str
    maximize: bool = False
    unpaired: bool = False


def welch_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """Return mean(a) - mean(b) of independent samples by Welch's test.

    >>> found = welch_difference([3.0, 5.0], [1.0, 1.5, 2.0])
    >>> found.estimate.mean
    2.5
    """
    test = scipy_stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval()
    gap = float(np.mean(a) - np.mean(b))
    return PairedDifference(Estimate(gap, float(interval.low), float(interval.high), len(a)), float(test.pvalue))


def difference(
    a: dict[int, float], b: dict[int, float], ratio: bool = False, unpaired: bool = False
) -> PairedDifference | None:
    """Return a - b of scores by seed, or the ratio of their geometric means; None where there is none.

    Args:
        a: one method's.
        b: the other's.
        ratio: compare logarithms.
        unpaired: by Welch's test.
    """
    values = [*a.values(), *b.values()]
    if not all(math.isfinite(v) and (v > 0 or not ratio) for v in values):
        return None
    if not unpaired:
        return paired_ratio(a, b) if ratio else paired_difference(a, b)
    if min(len(a), len(b)) < 2:
        return None
    one, two = ([math.log(v) if ratio else v for v in x.values()] for x in (a, b))
    found = welch_difference(one, two)
    if not ratio:
        return found
    e = found.estimate
    return PairedDifference(Estimate(math.exp(e.mean), math.exp(e.lo), math.exp(e.hi), e.n), found.p_value)


def estimate_text(estimate: Estimate, ratio: bool) -> str:
    """Write an estimate: mean ± half of the interval, or a factor with its interval."""
    if not ratio:
        return format_estimate(estimate)
    interval = "" if math.isnan(estimate.lo) else f" ({estimate.lo:.3g} to {estimate.hi:.3g})"
    return f"{estimate.mean:.3g}{interval}"


@dataclass(frozen=True)
class Row:
    """A method's scores on one metric in one setting, and its differences, one for each of ``over``."""

    name: str
    choice: str
    metric: str
    values: dict[int, float]
    differences: Sequence[PairedDifference | None]


def base_of(key: Key, over: str, keys: Mapping[Key, str]) -> Key | None:
    """Return the key of the row that a row is compared with; None where there is none, or it is itself.

    Args:
        key: the row's.
        over: a row's name, or ``SETTING=VALUE``.
        keys: names by key of the rows that there are.
    """
    name, equals, value = over.partition("=")
    found = next((k for k, n in keys.items() if n == over), None)
    if found is None and equals and name in dict(key):
        found = tuple((n, value if n == name else v) for n, v in key)
    return found if found in keys and found != key else None


def setting_rows(runs: Sequence[Run], question: Question, varied: Sequence[str]) -> list[Row]:
    """Return the rows of one setting.

    Raises:
        ToyError: a metric or a run to compare with is missing.
    """
    methods: dict[Key, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.key(question.rows), []).append(run)
    names = {key: method_name(key, varied) for key in methods}
    tune = (question.choose, question.tune, question.maximize)
    best = {key: chosen(found, names[key], *tune) for key, found in methods.items()}

    def scored(key: Key, metric: str) -> dict[int, float]:
        return {s: v for s, v in best[key].scores.get(metric, {}).items() if s not in question.tune}

    def base(key: Key, k: int) -> Key | None:
        """Return what ``over[k]`` is for a row; None where that pair stands, from either side, further left."""
        found = base_of(key, question.over[k], names)
        sides = ((key, found), (found, key))
        known = [(a, base_of(a, over, names)) for a in (key, found) if a is not None for over in question.over[:k]]
        return None if any(side in known for side in sides) else found

    rows = []
    for key in methods:
        for metric in question.metrics:
            found = []
            if not (mine := scored(key, metric)):
                continue  # such as the regret of weights that do nothing
            for k in range(len(question.over)):
                other = scored(b, metric) if (b := base(key, k)) is not None else {}
                ratio = metric in question.ratios
                found.append(difference(mine, other, ratio, question.unpaired) if other else None)
            how = choice(best[key], methods[key], question.rates)
            rows.append(Row(names[key], how, metric, mine, found))
    return rows


def row_text(row: Row, adjusted: Sequence[float | None], ratio: bool) -> str:
    """Write a row, with its adjusted p-values."""
    values = list(row.values.values())
    estimate = geometric_ci(values) if ratio else mean_ci(values)
    cells = [printable(row.name), row.choice, row.metric]
    cells.append("-" if estimate is None else estimate_text(estimate, ratio))
    for found, p in zip(row.differences, adjusted, strict=True):
        if found is None or p is None:
            cells.append("-")
            continue
        middle = 1.0 if ratio else 0.0
        side = "lower" if found.estimate.mean < middle else "higher"
        verdict = side if p < LEVEL else "no significant difference"
        cells.append(f"{'x ' if ratio else ''}{estimate_text(found.estimate, ratio)} (p = {p:.2g}, {verdict})")
    return f"| {' | '.join([*cells, ', '.join(f'{v:.3g}' for v in values)])} |"


def tables(runs: Sequence[Run], question: Question) -> str:
    """Return all tables in Markdown, and below them what their p-values are.

    Raises:
        ToyError: a metric is in no run, a run lacks the seeds to choose on, or there is nothing to compare with.
    """
    check_question(runs, question)
    varied = differing(runs, [])
    names = differing(runs, [*question.rows, *question.rates])
    parts = {key: setting_rows(found, question, varied) for key, found in groups(runs, names).items()}
    every = [row for rows in parts.values() for row in rows]
    values = {f"{n}={v}" for run in runs for n, v in run.key(question.rows)}
    known = list(dict.fromkeys(row.name for row in every))
    for over in question.over:
        require(
            over in known or over in values,
            f"--over: {over!r} is not allowed; give one of {', '.join(known)}, or SETTING=VALUE of the same methods",
        )
    p_values = [d.p_value for row in every for d in row.differences if d is not None]
    waiting = iter(holm(p_values).tolist())
    lines = []
    for key, rows in parts.items():
        title = ", ".join(f"{n} {short_value(v)}" for n, v in zip(names, key, strict=True) if v != ANY)
        head = ["run", "rates chosen", "metric", "mean", *(f"minus {o}" for o in question.over), "each seed"]
        lines += [f"**{title or 'all runs'}**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in rows:
            adjusted = [None if d is None else next(waiting) for d in row.differences]
            lines.append(row_text(row, adjusted, row.metric in question.ratios))
        lines.append("")
    test = "Welch's test" if question.unpaired else "paired t-test"
    how = f"{test}, Holm over the {len(p_values)} comparisons above"
    ratios = [m for m in question.metrics if m in question.ratios]
    lines.append(f"Mean ± half of the 95 % interval over seeds; p: {how}.")
    if ratios:
        lines[-1] += f" {', '.join(ratios)}: geometric means and their ratios."
    if question.tune:
        side = "greatest" if question.maximize else "least"
        seeds = ", ".join(map(str, question.tune))
        lines[-1] += f" Rates: {side} mean {question.choose} of seeds {seeds}, which are not scored."
    return "\n".join(lines)


def check_question(runs: Sequence[Run], question: Question) -> None:
    """Refuse what the runs cannot answer.

    Raises:
        ToyError: names the flag, the value and what there is.
    """
    known = list(dict.fromkeys(m for run in runs for m in run.scores))
    for flag, names in (("--metrics", question.metrics), ("--choose", [question.choose])):
        for name in names:
            hint = f"give some of {', '.join(known)}{did_you_mean(name, known)}"
            require(name in known, f"{flag}: {name!r} is not allowed; {hint}")
    settings = dict.fromkeys(n for run in runs for n in run.settings)
    for name in question.rows if list(question.rows) != ROWS.split(",") else []:
        require(name in settings, f"--rows: {name!r} is not allowed; it is no setting of these runs")
    for run in runs:
        seeds = set(run.scores.get(question.choose, next(iter(run.scores.values()), {})))
        absent = [s for s in question.tune if s not in seeds]
        require(not absent, f"--tune: {run.folder} has no seed {', '.join(map(str, absent))}")
        left = seeds - set(question.tune)
        require(len(left) > 0, f"--tune: {run.folder} has no other seed to be scored")


def parse(words: Sequence[str] | None) -> tuple[list[str], Question]:
    """Return folders and the question.

    Raises:
        ToyError: seeds are no integers.
    """
    parser = argparse.ArgumentParser("python -m lightning_toys.bilevel.paired_table", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", help="runs, or folders of runs")
    parser.add_argument("--over", default="", help="rows that the others are compared with, or SETTING=VALUE")
    parser.add_argument(
        "--tune", default="", help="seeds on which rates are chosen, such as 100,101; the rest is scored"
    )
    parser.add_argument("--metrics", default="outer_loss_all,outer_loss", help="of results.json")
    parser.add_argument("--choose", default="", help="the metric that chooses; by default the first")
    parser.add_argument("--maximize", action="store_true", help="the metric that chooses is better where it is greater")
    parser.add_argument("--ratios", default=RATIOS, help="metrics compared by ratios of geometric means")
    parser.add_argument("--rows", default=ROWS, help="settings that make a method")
    parser.add_argument("--rates", default=RATES, help="settings that are chosen for each method")
    parser.add_argument("--unpaired", action="store_true", help="Welch's test: seeds of two methods are independent")
    given = parser.parse_args(words)

    def listed(text: str) -> list[str]:
        return [w.strip() for w in text.split(",") if w.strip()]

    metrics, seeds = listed(given.metrics), listed(given.tune)
    require(len(metrics) > 0, "--metrics: '' is not allowed; give some of results.json")
    require(all(w.isdigit() for w in seeds), f"--tune: {given.tune!r} is not allowed; give seeds such as 100,101")
    question = Question(
        listed(given.rows),
        listed(given.rates),
        metrics,
        listed(given.ratios),
        listed(given.over),
        [int(w) for w in seeds],
        given.choose or metrics[0],
        given.maximize,
        given.unpaired,
    )
    return given.folders, question


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables; 2 if the input is bad."""
    try:
        folders, question = parse(words)
        print(tables(found_runs(folders), question))
    except ToyError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
