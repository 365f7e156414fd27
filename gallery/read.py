"""What recipes read out of run folders, and how they write it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from gallery.recipe import Entry, Folders
from lightning_toys.stats import (
    NO_LIMITS,
    NOT_NEGATIVE,
    PairedDifference,
    format_estimate,
    geometric_ci,
    holm,
    mean_ci,
    paired_difference,
    paired_ratio,
)

Content = dict[str, Any]
Make = Callable[[Folders], str]


def results(folder: Path, stage: str | None = None, **settings: str) -> Content:
    """Return the newest results of a folder that are of a stage and of settings (``model_evaluation_weights="raw"``).

    Raises:
        FileNotFoundError: there are none.
    """
    files = [folder / "results.json"]
    files += sorted(folder.glob("results-*.json"), key=lambda p: -int(p.stem.split("-")[1]))  # the newest first
    for path in files:
        if path.is_file():
            content: Content = json.loads(path.read_text())
            same = all(str(content["settings"].get(k.replace("__", "."))) == v for k, v in settings.items())
            if same and stage in (None, content["stage"]):
                return content
    raise FileNotFoundError(f"{folder}: no results of stage {stage} with {settings}")


def values(content: Content, metric: str) -> list[float]:
    """Return a metric's values, one a seed."""
    return [v for v in content["metrics"][metric]["values"] if v is not None]


def by_seed(content: Content, metric: str) -> dict[int, float]:
    """Return a metric's values by seed."""
    pairs = zip(content["seeds"], content["metrics"][metric]["values"], strict=True)
    return {s: v for s, v in pairs if v is not None}


def short(text: str) -> str:
    """Take the zero before each decimal point away."""
    return re.sub(r"(?<![\d.])0(?=\.\d)", "", text)


# of metrics that cannot be negative: distances, errors, shares. An interval that reaches below 0 is cut there
POSITIVE = re.compile(r"(goal_|mode_)?tv|off\d*|w1|conditional_ks|(\w+_)?kl(_\w+)?|regret|l[12]|cond_ratio|share_\w+")


def limits(metric: str) -> tuple[float, float]:
    """Return the least and the greatest value of a metric, of any readout.

    >>> limits("off3@8"), limits("mode_tv@mala"), limits("entropy_knn")
    ((0.0, inf), (0.0, inf), (-inf, inf))
    """
    return NOT_NEGATIVE if POSITIVE.fullmatch(metric.partition("@")[0]) else NO_LIMITS


def estimate(content: Content, metric: str) -> str:
    """Write a metric with its interval."""
    return format_estimate(mean_ci(values(content, metric)), limits=limits(metric))


def estimates(content: Content, *metrics: str) -> list[str]:
    """Write metrics with their intervals, as tables do; those that a run lacks as a dash."""
    found = {m: values(content, m) if m in content["metrics"] else [] for m in metrics}
    return ["0" if v and not any(v) else estimate(content, m) if v else "-" for m, v in found.items()]


def spread(found: Sequence[float], within: tuple[float, float] = NO_LIMITS) -> str:
    """Write mean ± half of the 95 % interval, as prose does; ``within``: of :func:`format_estimate`."""
    return short(format_estimate(mean_ci(found), limits=within))


def spread_to(found: Sequence[float], digits: int) -> str:
    """Write mean ± half of the 95 % interval to so many decimals."""
    e = mean_ci(found)
    return short(f"{e.mean:.{digits}f} ± {e.half_width:.{digits}f}")


@lru_cache(maxsize=4096)  # several tables of a page ask for the same hundreds of tests
def tested(a: tuple[tuple[int, float], ...], b: tuple[tuple[int, float], ...]) -> PairedDifference | None:
    """Return the paired t-test of values by seed."""
    return paired_difference(dict(a), dict(b))


def difference(a: Content, b: Content, metric: str) -> PairedDifference:
    """Return the difference paired by seed.

    Raises:
        ValueError: the runs share fewer than two seeds.
    """
    found = tested(tuple(by_seed(a, metric).items()), tuple(by_seed(b, metric).items()))
    if found is None:
        raise ValueError(f"{metric}: fewer than two seeds are shared")
    return found


def adjusted(differences: Iterable[PairedDifference]) -> list[float]:
    """Return the p-values of several differences, adjusted by Holm."""
    return [float(p) for p in holm([d.p_value for d in differences])]


def paired(a: Content, b: Content, metric: str) -> str:
    """Write the difference paired by seed, as prose does."""
    return short(format_estimate(difference(a, b, metric).estimate))


def geometric(content: Content, metric: str, count: int) -> str:
    """Write the geometric mean of positive values to so many significant figures."""
    found = geometric_ci(values(content, metric))
    if found is None:
        raise ValueError(f"{metric}: not all values are positive")
    return figures_of(found.mean, count)


def ratio(a: Content, b: Content, metric: str) -> str:
    """Write the ratio of geometric means paired by seed, with its interval: ``5.0 (2.5 to 10)``."""
    found = paired_ratio(by_seed(a, metric), by_seed(b, metric))
    if found is None:
        raise ValueError(f"{metric}: fewer than two seeds are shared, or not all values are positive")
    e = found.estimate
    return f"{figures_of(e.mean, 2)} ({figures_of(e.lo, 2)} to {figures_of(e.hi, 2)})"


def fixed(value: float, digits: int) -> str:
    """Write a number to so many decimals."""
    return short(f"{value:z.{digits}f}")  # z: no minus before a zero


def figures_of(value: float, count: int) -> str:
    """Write a number to so many significant figures, zeros at its end kept."""
    return short(f"{value:#.{count}g}").rstrip(".")


def between(found: Iterable[float], digits: int, greatest_first: bool = False) -> str:
    """Write the least and the greatest to so many decimals: ``.1 to .2``."""
    known = sorted((x for x in found if math.isfinite(x)), reverse=greatest_first)
    return f"{fixed(known[0], digits)} to {fixed(known[-1], digits)}"


def seeds_in_words(found: Sequence[float], digits: int) -> str:
    """Write one number a seed, to so many decimals: ``.1, .2 and .3``."""
    *first, last = (fixed(x, digits) for x in found)
    return f"{', '.join(first)} and {last}"


def table(head: str, rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; the first ``left`` columns are set to the left."""
    columns = head.split(" | ")
    lines = [f"| {head} |", "|" + "".join("---|" if i < left else "---:|" for i in range(len(columns)))]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv or of another table."""
    with path.open() as f:
        return list(csv.DictReader(f))


def entries(runs: Sequence[str], makes: dict[str, Make | str | None]) -> tuple[Entry, ...]:
    """Return entries that are made from the same runs."""
    return tuple(Entry(name, tuple(runs), make) for name, make in makes.items())
