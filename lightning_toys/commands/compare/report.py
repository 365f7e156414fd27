"""compare: runs side by side, with intervals over seeds, paired differences, and the rows that need no network."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console

from lightning_toys.commands.compare.runs import Run, find_results, load_runs
from lightning_toys.commands.compare.tables import ResultTable, metrics_tables, paired_table, readout_tables, to_csv
from lightning_toys.errors import ToyError, note
from lightning_toys.plotting import COLOURS, GREY, new_figure
from lightning_toys.stats import mean_ci
from lightning_toys.training.results import set_aside, write_atomic
from lightning_toys.training.results_format import experiment_named


def draw(runs: Sequence[Run], metric: str) -> Any:
    """Draw a metric of every run: each seed, mean and interval; reference rows as lines."""
    shown = [r for r in runs if r.values(metric)]
    figure, axes = new_figure(size=(7.6, 0.42 * len(shown) + 2.0))
    ax = axes[0, 0]
    found = [np.array(list(r.values(metric).values())) for r in shown]
    everything = np.concatenate(found) if found else np.ones(1)
    # over less than a decade a logarithmic axis has no readable ticks
    positive = everything.min() > 0 and everything.max() > 5 * everything.min()
    low = everything.min()
    for i, values in enumerate(found):
        e = mean_ci(values)
        half = 0.0 if math.isnan(e.half_width) else e.half_width
        left = min(half, e.mean - low / 4) if positive else half  # a logarithmic axis has no 0: the bar leaves it
        ax.plot(
            values, np.full(values.size, i), "o", color=COLOURS[0], alpha=0.6, markersize=4, label="_seeds", zorder=4
        )
        ax.errorbar(e.mean, i, xerr=[[left], [half]], fmt="D", color=COLOURS[1], capsize=4, markersize=6, zorder=3)
    styles = (":", "--", "-.", (0, (1, 1)), (0, (5, 1)))
    references = shown[0].content["references"] if shown else {}
    for (name, row), style in zip(references.items(), styles, strict=False):
        value = row.get(metric)
        # a spline may be orders below: it would squeeze everything else
        if value is not None and (value > low / 30 if positive else value > -np.abs(everything).max() * 20):
            ax.axvline(value, color=GREY, linestyle=style, linewidth=1.1, label=f"{name.replace('_', ' ')} {value:.3g}")
    ax.plot([], [], "o", color=COLOURS[0], alpha=0.4, label="each seed")
    ax.errorbar([], [], xerr=[], fmt="D", color=COLOURS[1], capsize=4, label="mean and 95 % CI")
    if positive:
        ax.set_xscale("log")
        ax.set_xlim(left=low / 2)
    ax.set_yticks(range(len(shown)), [r.label for r in shown])
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlabel((shown[0].label_of(metric) if shown else metric) + (f": {runs[0].group}" if runs[0].group else ""))
    figure.legend(*ax.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    return figure


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


def pictures_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Return a figure for each metric of runs on one target, by file name."""
    metrics = list(dict.fromkeys(m for r in runs for m in r.main_metrics))
    shown = [m for m in metrics if any(any(r.values(m).values()) for r in runs)]
    end = f"-{slug(runs[0].group)}" if runs[0].group else ""
    return {f"{m}{end}": draw(runs, m) for m in shown}


def slug(name: str) -> str:
    """Return a group's name for a file."""
    return re.sub(r"[^\w.=-]+", "_", name).strip("_")[:80]


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


def own_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the figures that an experiment of ours adds to a comparison of its runs."""
    kind = experiment_named(runs[0].content.get("module", ""))
    return {} if kind is None else dict(kind.compare_figures({r.name: r.folder for r in runs}))


def compare_folder(folder: Path, runs: Sequence[Path]) -> None:
    """Compare a sweep's cells, and say how to look at them."""
    compare_runs(load_runs(find_results(runs)), folder / "comparison")
    note(f"curves and figures: tensorboard --logdir {folder}")


def said(error: OSError | ValueError) -> str:
    """Return what an error of the file system's says, without the name."""
    return str(getattr(error, "strerror", None) or error)


class OneLineParser(argparse.ArgumentParser):
    """argparse with our errors."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing a usage."""
        raise ToyError(f"compare: {message}")


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


def compare_command(args: Sequence[str]) -> None:
    """Run `compare RUN_OR_FOLDER ... [--baseline LABEL] [--out FOLDER]`."""
    parser = OneLineParser(prog="cli.py compare", description="Put runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders above them")
    parser.add_argument(
        "--baseline", help="label (or part of one) or folder name that differences are taken from; default: the first"
    )
    parser.add_argument("--out", type=Path, help="folder for the files; default: comparison/ beside the runs")
    given = parser.parse_args(list(args))
    if given.out is not None:
        try:
            given.out.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise ToyError(f"--out: {given.out} is no folder that can be made ({said(error)})") from None
    runs = load_runs(find_results(given.runs))
    baselines = {} if given.baseline is None else baselines_named(runs, given.baseline)
    out = given.out
    if out is None:
        first = given.runs[0]
        out = (
            first if first.is_dir() and not (first / "results.json").exists() else runs[0].folder.parent
        ) / "comparison"
    compare_runs(runs, out, baselines)
