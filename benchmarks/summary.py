"""RESULTS.md's first table: ours, the best peer and the limit, from the sections that the other scripts wrote.

    python benchmarks/summary.py [--write]        # the last line of `make bench`

A row is a line with an aim in a table that has a column "ours / best peer" (benchmarks/peers.py). Where sections are of
different machines, or one is missing, that is said.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from measuring import RESULTS, write_section

SCRIPTS = (
    *("jitted_speed.py", "jitted_policy_speed.py", "jitted_control_speed.py"),
    *("jitted_mirror_speed.py", "demo_speed.py"),
)
RATIO = "ours / best peer"
COLUMNS = ("", "ours", "best peer", "which", RATIO, "aim", "", "limit", "its share of ours")
BEGIN = "<!-- summary.py -->\n"


class Row(NamedTuple):
    """A line of the first table."""

    name: str
    ours: str
    peer: str
    which: str
    ratio: str
    aim: str
    verdict: str
    limit: str
    share: str


def section(text: str, script: str) -> str:
    """Return what a script wrote; nothing if it has written nothing."""
    return text.partition(f"<!-- {script} -->\n")[2].partition(f"<!-- end of {script} -->\n")[0]


def cells(line: str) -> list[str]:
    """Return the cells of a table's line."""
    return [c.strip() for c in line.strip().strip("|").split("|")]


def rows(text: str) -> Iterator[Row]:
    """Yield the rows with an aim of a section's tables."""
    head: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells(line)
        elif RATIO in head and not set(line) <= set("|-: "):
            found = dict(zip(head, cells(line), strict=True))
            if found["aim"]:
                yield row(head, found)


def row(head: list[str], found: dict[str, str]) -> Row:
    """Return a line of the first table for one of a section's: its cells by column."""
    first = next(i for i, name in enumerate(head) if name.startswith("ours, "))
    unit = head[first].removeprefix("ours, ")
    name = ", ".join([found[head[0]], *(described(column, found[column]) for column in head[1:first])])
    aim, _, verdict = found["aim"].partition(": ")

    def value(column: str) -> str:
        number = found[f"{column}, {unit}"]
        return f"{number} {unit}" if number else ""

    peer, share = value("best peer"), found["its share of ours"]
    return Row(name, value("ours"), peer, found["which"], found[RATIO], aim, verdict, value("limit"), share)


def described(column: str, value: str) -> str:
    """Return a cell in words: ``width 64``, ``4 replicas``, ``1 replica``."""
    if not column.endswith("s"):
        return f"{column} {value}"
    return f"{value} {column.removesuffix('s') if value == '1' else column}"


def title(text: str) -> str:
    """Return what a section measures: its title up to "beside"."""
    found = re.search(r"^# (.*?)(?: beside .*)?$", text, re.MULTILINE)
    assert found is not None
    return found[1]


def machine_of(text: str) -> str:
    """Return the line of a section that names its day and machine."""
    found = re.search(r"^\d{4}-\d\d-\d\d: .*$", text, re.MULTILINE)
    assert found is not None
    return found[0]


def summary(text: str) -> str:
    """Return the first table, and what is to be said of it."""
    parts = {script: section(text, script) for script in SCRIPTS}
    there = {script: part for script, part in parts.items() if part}
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    met = total = 0
    for part in there.values():
        for found in rows(part):
            lines.append(f"| {title(part)}: {' | '.join(found)} |")
            met, total = met + (found.verdict == "met"), total + 1
    machines = {machine_of(part) for part in there.values()}
    said = sorted(machines) if len(machines) == 1 else [f"{s}: {machine_of(p)}" for s, p in there.items()]
    said += [f"{script}: nothing measured yet." for script in SCRIPTS if script not in there]
    head = ["# Ours, the best peer, the limit", "Written by `benchmarks/summary.py --write` from the sections below."]
    ratio = "Of each step, chain-step or whole run: medians, ours / best peer with its range over the rounds. "
    return "\n\n".join([*head, *said, f"{ratio}{met} of {total} aims are met.", "\n".join(lines)])


def make_room(path: Path) -> None:
    """Put this script's empty section at the beginning of a file that has none."""
    old = path.read_text()
    if BEGIN not in old:
        path.write_text(f"{BEGIN}{BEGIN.replace('<!-- ', '<!-- end of ')}\n{old}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into RESULTS.md, as its first section")
    args = parser.parse_args()
    text = summary(RESULTS.read_text())
    print(text)
    if args.write:
        make_room(RESULTS)
        write_section("summary.py", text)


if __name__ == "__main__":
    main()
