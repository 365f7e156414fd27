"""A comparison as one HTML page: it opens from a file, asks for nothing outside of it, and obeys no name that is in it.

Every text is escaped by jinja2. Beside that the page's own policy (CSP) has a browser run no script but the one that
sorts, whose hash it gives, and load nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning_toys import __version__
from lightning_toys.commands.compare.page_facts import (
    all_settings,
    differences,
    environment_of,
    facts_of,
    pairs,
    shared_keys,
    table_of,
)
from lightning_toys.commands.compare.page_pictures import FULL_DPI, embed_all
from lightning_toys.commands.compare.runs import Run
from lightning_toys.commands.compare.tables import ResultTable
from lightning_toys.errors import printable

TEMPLATE = Path(__file__).parent / "page_template"
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?inf"
# a number; a mean with half of its interval, or with the interval's ends, and of how many seeds; an interval alone
SEEDS = r"(?: \(\d+ of \d+\)| of \d+)?"
ORDERED = re.compile(
    rf"({NUMBER})(?: ± (?:{NUMBER})| \[(?:{NUMBER}), (?:{NUMBER})\])?{SEEDS}|\[({NUMBER}), (?:{NUMBER})\]"
)
NOTHING = re.compile(r"|nan|-(?: \(0 of \d+\))?")  # the second: not one value is finite


@dataclass(frozen=True)
class Cell:
    """A word of a table, and the number that it is sorted by if it is one."""

    text: str
    order: str | None
    missing: bool


def order(text: str) -> str | None:
    """Return the number that a word is sorted by, as JavaScript reads it: itself, a mean or an interval's lower end.

    >>> order("-0.123 ± 0.020"), order("[1e-05, 3]"), order("flow 2"), order("inf"), order("1 [0, 2] (2 of 4)")
    ('-0.123', '1e-05', None, 'Infinity', '1')
    """
    match = ORDERED.fullmatch(text)
    return (match[1] or match[2]).replace("inf", "Infinity") if match else None


def grid(table: ResultTable, links: Mapping[str, str]) -> dict[str, Any]:
    """Return a table as the template takes it.

    Args:
        table: what is printed.
        links: what the first word of a row leads to, by that word.
    """
    rows = [[Cell(printable(w), order(w), NOTHING.fullmatch(w) is not None) for w in row] for row in table.rows]
    columns = []
    for i, name in enumerate(table.columns):
        column = [row[i] for row in rows]
        number = i > 0 and all(c.missing or c.order is not None for c in column)
        columns.append({"name": printable(name), "number": number})
    linked = [links.get(row[0], "") for row in table.rows]
    shown = [{"cells": cells, "link": link} for cells, link in zip(rows, linked, strict=True)]
    return {"title": printable(table.title), "columns": columns, "rows": shown}


def link_to(path: Path, page: Path) -> str:
    """Return a link from a page to a file or folder, relative, so that both can be moved together.

    Nothing in a name is obeyed: a colon would end a scheme, ``#`` and ``?`` a path.

    >>> link_to(Path("/a/runs/javascript:x#1"), Path("/a/out/page.html"))
    '../runs/javascript%3Ax%231'
    >>> link_to(Path("/a/data:x"), Path("/a/page.html"))
    './data%3Ax'
    """
    relative = os.path.relpath(path, page.parent)
    return quote(os.fsencode(relative if relative.startswith(".") else f"./{relative}"), safe="/")


def hashed(text: str) -> str:
    """Return a text's hash as a policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def build_page(
    runs: Sequence[Run],
    baselines: Mapping[str, Run],
    tables: Mapping[str, Sequence[ResultTable]],
    pictures: Mapping[str, tuple[Path, bytes]],
    remarks: Sequence[str],
    page: Path,
) -> bytes:
    """Return the content of a page.

    Args:
        runs: of one experiment.
        baselines: by group, what differences are taken from.
        tables: by group, what is printed.
        pictures: by name, the file that a picture will be in, and its content (PNG).
        remarks: what else is printed.
        page: the file that it will be.

    Raises:
        ToyError: a run's config.yaml cannot be read.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    style, script = ((TEMPLATE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = {"img-src": "data:", "style-src": hashed(style), "script-src": hashed(script)}
    rules = {"default-src": "'none'", **allowed, "base-uri": "'none'", "form-action": "'none'"}
    anchors = {r.folder: f"#run-{i + 1}" for i, r in enumerate(runs)}
    in_group = {name: {r.label: anchors[r.folder] for r in runs if r.group == name} for name in tables}
    environment = Environment(loader=FileSystemLoader(TEMPLATE), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("page.html.jinja").render(
        version=__version__,
        title=f"Comparison: {printable(runs[0].content['experiment'])}",
        summary=summary(runs, baselines),
        policy="; ".join(f"{kind} {source}" for kind, source in rules.items()),
        style=style,
        script=script,
        remarks=[printable(r) for r in remarks],
        tables=[grid(t, in_group[name]) for name, members in tables.items() for t in members],
        **figures(pictures, page),
        **told_of_runs(runs, baselines, anchors, page),
    )
    return text.encode()


def figures(pictures: Mapping[str, tuple[Path, bytes]], page: Path) -> dict[str, Any]:
    """Return what the template shows of pictures: those there is room for, and links to the others."""
    embedded = embed_all({name: content for name, (_, content) in pictures.items()})
    shown, left_out = [], []
    for name, found in embedded.items():
        known = {"name": printable(name), "link": link_to(pictures[name][0], page)}
        if found is None:
            left_out.append(known)
        else:
            shown.append({**known, "dpi": found.dpi, "uri": found.uri, "width": found.width, "height": found.height})
    return {"pictures": shown, "left_out": left_out, "full_dpi": FULL_DPI}


def told_of_runs(
    runs: Sequence[Run], baselines: Mapping[str, Run], anchors: Mapping[Path, str], page: Path
) -> dict[str, Any]:
    """Return what the template shows of settings, environments and each run."""
    links = {r.name: anchors[r.folder] for r in runs}
    settings = [all_settings(r) for r in runs]
    same, other = shared_keys(settings)
    places = [environment_of(r) for r in runs]
    same_place, other_place = shared_keys(places)
    other_place = [k for k in other_place if k != "command"]  # the runs' own lists have it
    by_folder = dict(zip(anchors, settings, strict=True))
    first = next(iter(baselines.values()))
    others = {r.folder: first if r is baselines[r.group] else baselines[r.group] for r in runs}  # to differ from
    own = [
        {
            "anchor": anchors[r.folder].removeprefix("#"),
            "name": printable(r.name),
            "folder": printable(os.fspath(r.folder)),
            "link": link_to(r.folder, page),
            "is_baseline": r is baselines[r.group],
            "other": "" if r is first else printable(others[r.folder].name),
            "differences": differences(by_folder[r.folder], by_folder[others[r.folder].folder]),
            "facts": facts_of(r, same_place),
        }
        for r in runs
    ]
    return {
        "settings": grid(table_of("settings that differ", runs, other, settings), links) if other else None,
        "shared": pairs(same, settings[0]),
        "environment": grid(table_of("what differs", runs, other_place, places), links) if other_place else None,
        "shared_environment": pairs(same_place, places[0]),
        "runs": own,
    }


def summary(runs: Sequence[Run], baselines: Mapping[str, Run]) -> str:
    """Return the line below the title."""
    named = ", ".join(printable(b.name) for b in baselines.values())
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    made = f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by lightning-toys {__version__}."
    return f"{count}, baseline: {named}. {made}" if len(runs) > 1 else f"{count}. {made}"
