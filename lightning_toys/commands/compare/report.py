"""compare: runs side by side, with intervals over seeds, paired differences, and the rows that need no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from lightning_toys.commands.compare.own_figures import own_figures
from lightning_toys.commands.compare.plots import pictures_of
from lightning_toys.commands.compare.runs import Run, find_results, load_runs
from lightning_toys.commands.compare.tables import ResultTable, metrics_tables, paired_table, readout_tables, to_csv
from lightning_toys.errors import ToyError, note
from lightning_toys.training.files import set_aside, write_atomic


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
    for metric in dict.fromkeys(m for r in runs for m in r.headline):
        tables += readout_tables(runs, metric)
    return tables


def compare_runs(runs: Sequence[Run], out: Path, baselines: Mapping[str, Run] | None = None) -> None:
    """Print the comparison and write it as Markdown, CSV, LaTeX and pictures into ``out``.

    Args:
        runs: of one experiment.
        out: a folder.
        baselines: by group, what differences are taken from; the first run of a group else.
    """
    own = own_figures(runs)  # first: they read files of the runs, which may be refused
    groups = by_group(runs)
    first = {name: members[0] for name, members in groups.items()}
    tables = [s for name, x in groups.items() for s in tables_of(x, {**first, **(baselines or {})}[name])]
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.md": "\n".join(s.markdown() for s in tables),
        "comparison.csv": to_csv(runs),
        "comparison.tex": "\n".join(s.latex() for s in tables),
    }
    for name, text in texts.items():
        set_aside(out / name)
        write_atomic(out / name, text)
    pictures = []
    for figures in (*(pictures_of(x) for x in groups.values()), own):
        for name, figure in figures.items():
            path = out / f"{name}.png"
            set_aside(path)
            figure.savefig(path, dpi=150)
            pictures.append(path)
    console = Console(width=None if Console().is_terminal else 150)
    for table in tables:  # last: whoever reads them may stop, as `head` does
        console.print(table.rich())
    note(f"tables: {out}/comparison.md, .csv, .tex")
    note(f"pictures: {', '.join(map(str, pictures))}")


def compare_folder(folder: Path, runs: Sequence[Path]) -> None:
    """Compare a sweep's cells, and say how to look at them."""
    compare_runs(load_runs(find_results(runs)), folder / "comparison")
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
            labels = ", ".join(repr(r.name) for r in members)
            raise ToyError(f"--baseline: {asked!r} fits {len(hits)} of the runs; give one of {labels}")
        if hits:
            out[group] = hits[0]
    if not out:
        labels = ", ".join(repr(r.name) for r in runs)
        raise ToyError(f"--baseline: {asked!r} fits 0 of the runs; give one of {labels}")
    return out
