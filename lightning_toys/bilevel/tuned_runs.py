"""Finished runs parted by what they were asked: settings, methods, and the rates that are chosen for each method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_toys.errors import ToyError, printable, require
from lightning_toys.training.results_format import read_results

ANY = "*"  # of a setting that does nothing in a run: it belongs to every value

Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: of the run.
        settings: those that do something in it, and ``step``, written out.
        scores: metric to value by seed; NaN where there is none.
    """

    folder: Path
    settings: Mapping[str, str]
    scores: Mapping[str, Mapping[int, float]]

    def key(self, names: Sequence[str]) -> Key:
        """Return the named settings that do something here."""
        return tuple((n, self.settings[n]) for n in names if n in self.settings)


def read_run(path: Path) -> Run:
    """Read a run's results.json."""
    found = read_results(path)
    unused = set(found.get("unused", []))
    settings: dict[str, Any] = {k: v for k, v in (found.get("settings") or {}).items() if k not in unused}
    settings.pop("model.seeds", None)
    settings["step"] = found.get("step")
    scores = {
        name: {int(s): math.nan if v is None else float(v) for s, v in zip(found["seeds"], m["values"], strict=True)}
        for name, m in found["metrics"].items()
    }
    return Run(path.parent, {k: str(v) for k, v in settings.items()}, scores)


def found_runs(folders: Sequence[str]) -> list[Run]:
    """Return the finished runs below some folders.

    Raises:
        ToyError: there is none, or a results.json is none.
    """
    paths = sorted({path for folder in folders for path in Path(folder).rglob("results.json")})
    require(len(paths) > 0, f"{' '.join(folders)}: no finished run; give folders that hold results.json")
    runs = []
    for path in paths:
        try:
            runs.append(read_run(path))
        except (ValueError, OSError) as error:
            raise ToyError(f"{path} is no results.json of a run ({' '.join(str(error).split())})") from None
    return runs


def short_value(value: str) -> str:
    """Return a setting's value on one line, a class by its last name.

    >>> short_value("lightning_toys.bilevel.Sine"), short_value("0.05")
    ('Sine', '0.05')
    """
    last = value.rpartition(".")[2]
    return printable(last if last.isidentifier() else value)


def method_name(key: Key, varied: Iterable[str]) -> str:
    """Return a row's name: the method, and of its other settings those that are varied.

    >>> method_name((("model.algorithm", "funcbo"), ("model.smoothing", "10")), ["model.smoothing"])
    'funcbo, smoothing 10'
    """
    words = []
    for name, value in key:
        short = name.rpartition(".")[2]
        if short in ("algorithm", "agent"):
            words.append(short_value(value))
        elif name in varied:
            words.append(f"{short} {value}")
    return ", ".join(words) or "all"


def differing(runs: Sequence[Run], without: Sequence[str]) -> list[str]:
    """Return the settings, but for some, that are not the same in all runs in which they do something."""
    names = dict.fromkeys(n for run in runs for n in run.settings)
    return [n for n in names if n not in without and len({run.settings[n] for run in runs if n in run.settings}) > 1]


def groups(runs: Sequence[Run], names: Sequence[str]) -> dict[tuple[str, ...], list[Run]]:
    """Part runs by the named settings; one in which some of them do nothing is in every group that fits the others.

    >>> a, b, c = (Run(Path(), s, {}) for s in ({"x": "1"}, {"x": "2"}, {}))
    >>> {k: len(v) for k, v in groups([a, b, c], ["x"]).items()}
    {('1',): 2, ('2',): 2}
    """

    def fits(one: Sequence[str], other: Sequence[str]) -> bool:
        return all(a in (b, ANY) for a, b in zip(one, other, strict=True))

    combinations = dict.fromkeys(tuple(run.settings.get(n, ANY) for n in names) for run in runs)
    whole = [c for c in combinations if not any(d != c and fits(c, d) for d in combinations)]
    return {c: [run for run in runs if fits([run.settings.get(n, ANY) for n in names], c)] for c in whole}


def chosen(candidates: Sequence[Run], name: str, metric: str, seeds: Sequence[int], maximize: bool = False) -> Run:
    """Return the run with the best mean of a metric over some seeds; one whose mean is not finite is the last choice.

    Args:
        candidates: one at least.
        name: of the method, for the error.
        metric: that chooses.
        seeds: on which it does.
        maximize: whether more of it is better.

    Raises:
        ToyError: there are several candidates, and no seeds.
    """
    if len(candidates) == 1:
        return candidates[0]
    shown = ", ".join(str(run.folder) for run in candidates[:3])
    require(len(seeds) > 0, f"--tune: {len(candidates)} runs are {name} ({shown}); give seeds to choose on")
    means = []
    for run in candidates:
        values = [run.scores.get(metric, {}).get(s, math.nan) for s in seeds]
        mean = float(np.mean(values)) * (-1 if maximize else 1)
        means.append(mean if math.isfinite(mean) else math.inf)
    return candidates[int(np.argmin(means))]


def choice(run: Run, candidates: Sequence[Run], rates: Sequence[str]) -> str:
    """Say which rates were chosen, and which of them are the least or the largest of several that were tried."""
    words = []
    for name in rates:
        if name not in run.settings or len({c.settings.get(name) for c in candidates}) < 2:
            continue
        value, tried = run.settings[name], {c.settings[name] for c in candidates if name in c.settings}
        words.append(f"{name.rpartition('.')[2]} {value}")
        try:
            numbers = sorted(float(v) for v in tried)
        except ValueError:  # a list
            continue
        if float(value) in (numbers[0], numbers[-1]):
            words[-1] += " (at the edge)"
    return ", ".join(words) or "-"
