"""compare: runs side by side, with intervals over seeds, paired differences, and the rows that need no network."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from lightning_toys.errors import ToyError, note
from lightning_toys.plotting import COLOURS, GREY, new_figure
from lightning_toys.settings import flatten, short
from lightning_toys.stats import holm, mean_ci, paired_difference, written
from lightning_toys.strict_yaml import strict_load
from lightning_toys.training.results import is_main, set_aside, write_atomic
from lightning_toys.training.results_form import experiment_named, read_results

MAX_KEYS = 4  # settings that a run's name spells out
MAX_COLUMNS = 6  # metrics in one table


@dataclass(frozen=True)
class Run:
    """One results.json."""

    folder: Path
    label: str
    content: dict[str, Any]

    def values(self, metric: str) -> dict[int, float]:
        """Return a metric's finite values by seed; empty where the run lacks it."""
        found = self.content["metrics"].get(metric)
        if found is None:
            return {}
        return {s: v for s, v in zip(self.content["seeds"], found["values"], strict=True) if v is not None}

    @property
    def main_metrics(self) -> list[str]:
        """The configured readout's metrics, those of single outputs and modes left out."""
        return [m for m in self.content["metrics"] if is_main(m)]

    @property
    def headline(self) -> list[str]:
        """The metrics whose every readout is worth a table."""
        return list(self.content.get("headline", ["l2"]))

    def label_of(self, metric: str) -> str:
        """Return a metric's name for an axis."""
        return str(self.content.get("metric_labels", {}).get(metric, metric))

    def readouts(self, metric: str) -> list[str]:
        """Return the readouts that a metric is known of, names like ``zeros/euler-9``."""
        return [m.removeprefix(f"{metric}@") for m in self.content["metrics"] if m.startswith(f"{metric}@")]


def find_results(paths: Sequence[Path]) -> list[Path]:
    """Return the results.json of each run folder named, or of all below a folder named.

    Raises:
        ToyError: a path does not exist, or holds no results.
    """
    out: list[Path] = []
    for path in paths:
        if not os.path.exists(path):  # Path's raises where a name is too long
            raise ToyError(f"compare: no file or folder {str(path)!r}")
        if path.is_file():
            found = [path]
        elif (path / "results.json").is_file():
            found = [path / "results.json"]
        else:
            found = sorted(path.rglob("results.json"))
        if not found:
            raise ToyError(f"compare: no results.json in {path}; run `test` first")
        out += [f for f in found if f not in out]
    return out


def settings(folder: Path) -> dict[str, Any]:
    """Return a run's flat model and data settings."""
    config = folder / "config.yaml"
    if not config.is_file():
        return {}
    try:
        loaded = strict_load(config.read_text())
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ToyError(f"compare: {config} cannot be read ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(loaded, dict):
        raise ToyError(f"compare: {config} is not a configuration")
    return flatten({k: loaded.get(k) for k in ("model", "data")})


def load_runs(files: Sequence[Path]) -> list[Run]:
    """Read the runs and label each by the settings in which they differ.

    Raises:
        ToyError: a file is no results.json of this project, or the runs are of different experiments.
    """
    contents = []
    for file in files:
        try:
            contents.append(read_results(file))
        except (ValueError, OSError) as error:
            why = " ".join(str(error).split())
            raise ToyError(f"compare: {file} is not a results.json of lightning_toys ({why})") from None
    experiments = sorted({c["experiment"] for c in contents})
    if len(experiments) > 1:
        raise ToyError(f"compare: the runs are of different experiments: {', '.join(experiments)}")
    flat = [c.get("settings") or settings(f.parent) for f, c in zip(files, contents, strict=True)]
    keys = [k for k in dict.fromkeys(k for s in flat for k in s) if len({repr(s.get(k)) for s in flat}) > 1]
    keys = [k for k in keys if not k.startswith("model.evaluation.test_") and k != "model.seeds"]
    labels = []
    for file, content, s in zip(files, contents, flat, strict=True):
        found = {k: short(s[k]) for k in keys if k in s}
        words = [str(v) if k.endswith((".mode", ".kind")) else f"{k.split('.')[-1]}={v}" for k, v in found.items()]
        # of runs that differ in much, such as in their model, the settings would be no name
        named = bool(words) and len(keys) <= MAX_KEYS
        labels.append(" ".join(words) if named else content.get("label", file.parent.name))
    if differing := [k for k in keys if k.startswith("data.target")]:
        note(f"note: the runs differ in {', '.join(differing)}: their errors are answers to different questions")
    if len(set(labels)) < len(labels):
        labels = [f"{name} ({f.parent.parent.name}/{f.parent.name})" for name, f in zip(labels, files, strict=True)]
    return [Run(f.parent, name, c) for f, name, c in zip(files, labels, contents, strict=True)]


@dataclass
class Sheet:
    """A table: a title, column names and rows of words."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """Return it for the terminal."""
        table = Table(title=self.title, title_justify="left", header_style="bold")
        for i, column in enumerate(self.columns):
            if i == 0:
                table.add_column(column, min_width=12)
            else:
                table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "|".join("---" if i == 0 else "---:" for i in range(len(self.columns))) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """Return it as a booktabs table."""

        def cell(word: str) -> str:
            for a, b in (("\\", r"\textbackslash{}"), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("#", r"\#")):
                word = word.replace(a, b)
            return word.replace(" ± ", r" $\pm$ ")

        lines = [r"\begin{table}", rf"\caption{{{cell(self.title)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}", r"\toprule"]
        lines += [" & ".join(map(cell, self.columns)) + r" \\", r"\midrule"]
        lines += [" & ".join(map(cell, row)) + r" \\" for row in self.rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def metrics_sheets(runs: Sequence[Run]) -> list[Sheet]:
    """Return the configured readouts' metrics, and the reference rows, in tables that are not too wide."""
    metrics = list(dict.fromkeys(m for r in runs for m in r.main_metrics))
    return [metrics_sheet(runs, metrics[i : i + MAX_COLUMNS]) for i in range(0, len(metrics), MAX_COLUMNS)]


def metrics_sheet(runs: Sequence[Run], metrics: Sequence[str]) -> Sheet:
    """Return some of the configured readouts' metrics, and the reference rows."""
    rows = []
    for r in runs:
        cells = [written(mean_ci(list(v.values()))) if (v := r.values(m)) else "-" for m in metrics]
        rows.append([r.label, str(len(r.content["seeds"])), *cells])
    same = len({json.dumps(r.content["references"], sort_keys=True) for r in runs}) == 1
    for r in runs[:1] if same else runs:
        for name, found in r.content["references"].items():
            cells = [f"{found[m]:.4g}" if found.get(m) is not None else "-" for m in metrics]
            if set(cells) == {"-"}:
                continue
            rows.append([f"reference: {name}" if same else f"reference: {name} ({r.label})", "", *cells])
    return Sheet("mean ± half of the 95 % interval over seeds", ["run", "seeds", *metrics], rows)


def readout_sheets(runs: Sequence[Run], metric: str) -> list[Sheet]:
    """Return a metric of every readout of every run: a table for each set of readouts (and law, where it is wide)."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for r in runs:
        laws: dict[str, list[str]] = {}
        known = r.readouts(metric)
        for name in known:
            laws.setdefault(name.split("/")[0] if "/" in name else "", []).append(name)
        for columns in [known] if len(known) <= 4 else laws.values():
            for i in range(0, len(columns), MAX_COLUMNS):
                groups.setdefault(tuple(columns[i : i + MAX_COLUMNS]), []).append(r)
    sheets = []
    for names, members in groups.items():
        rows = []
        for r in members:
            found = [r.values(f"{metric}@{n}") for n in names]
            rows.append([r.label, *(written(mean_ci(list(v.values()))) if v else "-" for v in found)])
        law = names[0].split("/")[0]
        one_law = all(n.startswith(f"{law}/") for n in names)
        title = f"{metric} by readout of the same checkpoint"
        if "/" in names[0]:
            title += ", x0 " + (law if one_law else "zeros or Gaussian")
        heads = [n.split("/")[1] if one_law else n.replace("/", " ") for n in names]
        sheets.append(Sheet(title, ["run", *heads], rows))
    return sheets


def paired_sheet(runs: Sequence[Run], baseline: Run) -> Sheet | None:
    """Return each run's paired differences from the baseline, p-values adjusted by Holm within a metric."""
    rows: list[list[str]] = []
    for metric in baseline.main_metrics:
        pairs = [
            (r, d)
            for r in runs
            if r is not baseline and (d := paired_difference(r.values(metric), baseline.values(metric)))
        ]
        if not pairs:
            continue
        adjusted = holm([d.p_value for _, d in pairs])
        for (r, d), p in zip(pairs, adjusted, strict=True):
            e = d.estimate
            rows.append([r.label, metric, written(e), f"[{e.lo:.4g}, {e.hi:.4g}]", str(e.n), f"{p:.2g}"])
    if not rows:
        return None
    columns = ["run", "metric", "difference", "95 % interval", "pairs", "p (Holm)"]
    return Sheet(f"paired by seed: run minus {baseline.label}", columns, rows)


def to_csv(runs: Sequence[Run]) -> str:
    """Return every metric of every run and reference row, one a line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "folder", "metric", "readout", "mean", "ci95_lo", "ci95_hi", "replicas", "values"])
    for r in runs:
        for name in r.content["metrics"]:
            values = list(r.values(name).values())
            if not values:
                continue
            metric, _, readout = name.partition("@")
            e = mean_ci(values)
            row = [r.label, str(r.folder), metric, readout, e.mean, e.lo, e.hi, e.n, " ".join(map(repr, values))]
            writer.writerow(["" if isinstance(x, float) and math.isnan(x) else x for x in row])
        for name, found in r.content["references"].items():
            for metric, value in found.items():
                if value is not None:
                    writer.writerow(
                        [f"reference: {name} ({r.label})", str(r.folder), metric, "", value, "", "", "", ""]
                    )
    return text.getvalue()


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
    ax.set_xlabel(shown[0].label_of(metric) if shown else metric)
    figure.legend(*ax.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside upper center")
    return figure


def compare_runs(runs: Sequence[Run], out: Path, baseline: Run | None = None) -> None:
    """Print the comparison and write it as Markdown, CSV, LaTeX and pictures into ``out``."""
    own = own_figures(runs)  # first: they read files of the runs, which may be refused
    sheets = metrics_sheets(runs)
    if paired := paired_sheet(runs, baseline or runs[0]):
        sheets.append(paired)
    for metric in dict.fromkeys(m for r in runs for m in r.headline):
        sheets += readout_sheets(runs, metric)
    console = Console(width=None if Console().is_terminal else 150)
    for sheet in sheets:
        console.print(sheet.rich())
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.md": "\n".join(s.markdown() for s in sheets),
        "comparison.csv": to_csv(runs),
        "comparison.tex": "\n".join(s.latex() for s in sheets),
    }
    for name, text in texts.items():
        set_aside(out / name)
        write_atomic(out / name, text)
    pictures = []
    for metric in dict.fromkeys(m for r in runs for m in r.main_metrics):
        if any(any(r.values(metric).values()) for r in runs):
            path = out / f"{metric}.png"
            set_aside(path)
            draw(runs, metric).savefig(path, dpi=150)
            pictures.append(path)
    for name, figure in own.items():
        path = out / f"{name}.png"
        set_aside(path)
        figure.savefig(path, dpi=150)
        pictures.append(path)
    note(f"tables: {out}/comparison.md, .csv, .tex")
    note(f"pictures: {', '.join(map(str, pictures))}")


def own_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the figures that an experiment of ours adds to a comparison of its runs."""
    kind = experiment_named(runs[0].content.get("module", ""))
    return {} if kind is None else dict(kind.compare_figures({r.label: r.folder for r in runs}))


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
    baseline = None
    if given.baseline is not None:
        exact = [r for r in runs if given.baseline in (r.label, r.folder.name)]
        hits = exact or [r for r in runs if given.baseline in r.label]
        if len(hits) != 1:
            labels = ", ".join(repr(r.label) for r in runs)
            raise ToyError(f"--baseline: {given.baseline!r} fits {len(hits)} of the runs; give one of {labels}")
        baseline = hits[0]
    out = given.out
    if out is None:
        first = given.runs[0]
        out = (
            first if first.is_dir() and not (first / "results.json").exists() else runs[0].folder.parent
        ) / "comparison"
    compare_runs(runs, out, baseline)
