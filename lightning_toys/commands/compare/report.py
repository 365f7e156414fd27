"""compare: runs side by side, with intervals over seeds, paired differences, and the rows that need no network."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from lightning_toys.commands.compare.names import distinct, encodable, file_stem
from lightning_toys.commands.compare.output import Place, write_together
from lightning_toys.commands.compare.own_figures import own_figures
from lightning_toys.commands.compare.page import build_page
from lightning_toys.commands.compare.plots import pictures_of, png
from lightning_toys.commands.compare.runs import Run, find_results, load_runs, questions
from lightning_toys.commands.compare.tables import (
    ResultTable,
    error_table,
    metrics_tables,
    paired_table,
    readout_tables,
    to_csv,
)
from lightning_toys.errors import ToyError, note, printable


def by_group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs by their target."""
    out: dict[str, list[Run]] = {}
    for r in runs:
        out.setdefault(r.group, []).append(r)
    return out


def tables_of(runs: Sequence[Run], baseline: Run) -> list[ResultTable]:
    """Return the tables of runs on one target."""
    tables = metrics_tables(runs)
    if paired := paired_table(runs, baseline):
        tables.append(paired)
    if errors := error_table(runs, baseline):
        tables.append(errors)
    for metric in dict.fromkeys(m for r in runs for m in r.headline):
        tables += readout_tables(runs, metric)
    return tables


def question_remarks(runs: Sequence[Run]) -> list[str]:
    """Return what there is to say where runs were asked different questions."""
    if not (asked := questions([r.settings for r in runs], [r.content for r in runs])):
        return []
    keys = ", ".join(asked)
    return [f"note: the runs differ in {keys}: errors are answers to different questions, in a table each"]


def finite_remarks(runs: Sequence[Run]) -> list[str]:
    """Return what there is to say where values are not finite."""
    if not any(r.left_out(m) for r in runs for m in r.content["metrics"]):
        return []
    return [
        "note: values that are not finite are left out of means, differences and pictures: '(2 of 4)' is of two seeds "
        "out of four, and looks better than it is"
    ]


def file_names(pictures: Sequence[str]) -> list[str]:
    """Return a file's name for each picture."""
    return [f"{stem}.png" for stem in distinct(map(file_stem, pictures))]


def compare_runs(
    runs: Sequence[Run], out: Path, baselines: Mapping[str, Run] | None = None, page: Path | None = None
) -> None:
    """Print the comparison and write it as Markdown, CSV, LaTeX and pictures into ``out``, and as a page.

    All of it is made before the first file is written.

    Args:
        runs: of one experiment.
        out: a folder.
        baselines: by group, what differences are taken from; the first run of a group else.
        page: the HTML file, if one is wanted.

    Raises:
        ToyError: a folder cannot be written, or an experiment's own figures fail; nothing is written.
    """
    groups = by_group(runs)
    chosen = {name: members[0] for name, members in groups.items()} | dict(baselines or {})
    by_target = {name: tables_of(x, chosen[name]) for name, x in groups.items()}
    tables = [s for x in by_target.values() for s in x]
    texts = {
        "comparison.md": "\n".join(s.markdown() for s in tables),
        "comparison.csv": to_csv(runs),
        "comparison.tex": "\n".join(s.latex() for s in tables),
    }
    own, remarks = own_figures(runs)
    drawn = [(name, png(figure)) for x in groups.values() for name, figure in pictures_of(x).items()]
    drawn += own.items()
    pictures = dict(zip(file_names([name for name, _ in drawn]), (content for _, content in drawn), strict=True))
    places = [Place("--out", out, {name: text.encode() for name, text in texts.items()} | pictures)]
    remarks = [*question_remarks(runs), *finite_remarks(runs), *remarks]
    if page:
        files = {name: (out / name, content) for name, content in pictures.items()}
        places.append(
            Place("--html", page.parent, {page.name: build_page(runs, chosen, by_target, files, remarks, page)})
        )
    write_together(places)
    for remark in remarks:
        note(printable(remark))
    show(tables)  # last: whoever reads them may stop, as `head` does
    note(printable(f"tables: {out}/comparison.md, .csv, .tex"))
    note(printable(f"pictures: {', '.join(str(out / name) for name in pictures)}"))
    if page:
        note(printable(f"page: {page}"))


def show(tables: Sequence[ResultTable]) -> None:
    """Print tables, in what the terminal's encoding holds."""
    console = Console(width=None if Console().is_terminal else 150)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for table in tables:
        with console.capture() as held:
            console.print(table.rich(encoding))
        sys.stdout.write(encodable(held.get().replace("…", encodable("…", encoding)[:1]), encoding))


def compare_folder(folder: Path, runs: Sequence[Path]) -> None:
    """Compare a sweep's cells, and say how to look at them."""
    out = folder / "comparison"
    compare_runs(load_runs(find_results(runs)), out, page=out / "comparison.html")
    note(f"curves and figures: tensorboard --logdir {folder}")


def baselines_named(runs: Sequence[Run], asked: str) -> dict[str, Run]:
    """Return the baseline of each group: the run of that label or folder, or the one whose label holds the words.

    Raises:
        ToyError: it fits none, or several of a group.
    """
    out: dict[str, Run] = {}
    for group, members in by_group(runs).items():
        exact = [r for r in members if asked in (r.label, r.name, r.folder.name)]
        hits = exact or [r for r in members if asked in r.name]
        if len(hits) > 1:
            raise ToyError(f"--baseline: {asked!r} fits {len(hits)} of the runs; give one of {names_of(members)}")
        if hits:
            out[group] = hits[0]
    if not out:
        raise ToyError(f"--baseline: {asked!r} fits 0 of the runs; give one of {names_of(runs)}")
    return out


def names_of(runs: Sequence[Run]) -> str:
    """Return the runs' names for an error, the first of many."""
    names = [repr(r.name if len(r.name) <= 120 else f"{r.name[:80]}...{r.name[-30:]}") for r in runs[:20]]
    return ", ".join([*names, "..."] if len(runs) > 20 else names)
