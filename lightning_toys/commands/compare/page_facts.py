"""What the page of a comparison tells of its runs beside their numbers: settings, environment, and how they differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_toys.commands.compare.runs import UNUSED, Run, whole_config
from lightning_toys.commands.compare.tables import ResultTable
from lightning_toys.commands.settings import flatten
from lightning_toys.errors import printable
from lightning_toys.plotting import shortened

MOST_COLUMNS = 30  # of a table of settings
MOST_ROWS = 300  # of a list
MOST_CHARACTERS = 600  # of a value
FOLDER = ("run", "ckpt_path", "config")  # where a run lies, and not what it is
ABSENT = "-"


def word(value: Any) -> str:
    """Return a setting's value as text."""
    return "does nothing here" if value is UNUSED else shortened(printable(str(value)), MOST_CHARACTERS)


def all_settings(run: Run) -> dict[str, Any]:
    """Return a run's flat settings: of its model and data as it was judged with, the others of its config.yaml.

    Raises:
        ToyError: config.yaml cannot be read.
    """
    config = {k: v for k, v in whole_config(run.folder).items() if k not in ("model", "data", *FOLDER)}
    return run.settings | flatten(config)


def shared_keys(flat: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the keys whose values all mappings share, and the others, both in the order in which they come.

    >>> shared_keys([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}])
    (['a'], ['b', 'c'])
    """
    keys = dict.fromkeys(k for s in flat for k in s)
    same = {k for k in keys if len({word(s.get(k, ABSENT)) for s in flat}) == 1}
    return [k for k in keys if k in same], [k for k in keys if k not in same]


def differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (setting, this run's value, the other's) for each that is not the same.

    >>> differences({"lr": 0.1, "x": 1}, {"lr": 0.2, "x": 1, "y": None})
    [('lr', '0.1', '0.2'), ('y', '-', 'None')]
    """
    found = ((k, word(mine.get(k, ABSENT)), word(other.get(k, ABSENT))) for k in dict.fromkeys((*mine, *other)))
    return cut([(printable(k), a, b) for k, a, b in found if a != b], ("...", "", ""))


def cut(rows: list[Any], last: Any) -> list[Any]:
    """Return the first of many rows, and one that says so."""
    return rows if len(rows) <= MOST_ROWS else [*rows[:MOST_ROWS], last]


def pairs(keys: Sequence[str], found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return some entries as text."""
    return cut([(printable(k), word(found.get(k, ABSENT))) for k in keys], ("...", ""))


def environment_of(run: Run) -> dict[str, Any]:
    """Return where a run was judged, flat: commit, machine, versions by package, as far as results.json says."""
    held = run.content.get("environment")
    known = flatten(held) if isinstance(held, dict) else {}
    git = run.content.get("git")
    out: dict[str, Any] = {}
    if isinstance(git, dict):
        out["commit"] = f"{git.get('commit', ABSENT)}{', with changes' if git.get('dirty') else ''}"
    return out | {k.removeprefix("versions."): v for k, v in known.items()}


def facts_of(run: Run, shared: Sequence[str]) -> list[tuple[str, str]]:
    """Return what there is to know of a run, its environment last, without what all runs share of that."""
    known: dict[str, Any] = {k: run.content[k] for k in ("variant", "seeds", "stage", "step") if k in run.content}
    if os.path.lexists(run.folder / "config-1.yaml"):
        known["later settings"] = "config-1.yaml and so on: resumed with other settings than those of config.yaml"
    known |= {k: v for k, v in environment_of(run).items() if k not in shared}
    return pairs(list(known), known)


def table_of(title: str, runs: Sequence[Run], keys: Sequence[str], found: Sequence[Mapping[str, Any]]) -> ResultTable:
    """Return a table with a row for each run and a column for each key, up to what can be looked through."""
    chosen = keys[:MOST_COLUMNS]
    more = f"; the first {MOST_COLUMNS} of {len(keys)}, all are listed below by run" if len(keys) > len(chosen) else ""
    rows = [[r.name, *(word(x.get(k, ABSENT)) for k in chosen)] for r, x in zip(runs, found, strict=True)]
    return ResultTable(f"{title}{more}", ["run", *chosen], rows)
