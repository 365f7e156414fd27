"""The tables of a comparison."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_toys.commands.compare.names import encodable, latex_text, markdown_text
from lightning_toys.commands.compare.runs import Run, differing, group_names
from lightning_toys.errors import printable
from lightning_toys.stats import (
    Estimate,
    format_estimate,
    geometric_ci,
    holm,
    mean_ci,
    paired_difference,
    paired_ratio,
)
from lightning_toys.training.results import limits_in

MAX_COLUMNS = 6  # metrics in one table


@dataclass
class ResultTable:
    """A table: a title, column names and rows of words."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self, encoding: str = "utf-8") -> Table:
        """Return it for a terminal of some encoding; words are shown as they are, without rich's own markup."""

        def text(word: str, **how: Any) -> Text:
            return Text(encodable(printable(word), encoding), **how)

        rows = [[text(row[0]), *(text(word, no_wrap=True) for word in row[1:])] for row in self.rows]
        table = Table(title=text(self.title), title_justify="left", header_style="bold")
        for i, column in enumerate(self.columns):
            if i == 0:
                table.add_column(text(column), min_width=12, overflow="fold")
            else:  # numbers stay whole, a long name above them is folded
                width = max((row[i].cell_len for row in rows), default=1)
                table.add_column(text(column), justify="right", overflow="fold", min_width=width)
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [f"**{markdown_text(self.title)}**", "", "| " + " | ".join(map(markdown_text, self.columns)) + " |"]
        lines.append("|" + "|".join("---" if i == 0 else "---:" for i in range(len(self.columns))) + "|")
        lines += ["| " + " | ".join(map(markdown_text, row)) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """Return it as a booktabs table."""
        lines = [r"\begin{table}", rf"\caption{{{latex_text(self.title)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}", r"\toprule"]
        lines += [" & ".join(map(latex_text, self.columns)) + r" \\", r"\midrule"]
        lines += [" & ".join(map(latex_text, row)) + r" \\" for row in self.rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def metrics_tables(runs: Sequence[Run]) -> list[ResultTable]:
    """Return the configured readouts' metrics, and the reference rows, in tables that are not too wide."""
    metrics = list(dict.fromkeys(m for r in runs for m in r.main_metrics))
    return [metrics_table(runs, metrics[i : i + MAX_COLUMNS]) for i in range(0, len(metrics), MAX_COLUMNS)]


def metrics_table(runs: Sequence[Run], metrics: Sequence[str]) -> ResultTable:
    """Return some of the configured readouts' metrics, and the reference rows."""
    rows = []
    for r in runs:
        rows.append([r.label, str(len(r.content["seeds"])), *(mean_cell(r, m) for m in metrics)])
    cut = any(" [" in cell for row in rows for cell in row[2:])
    rows += reference_rows(runs, metrics)
    what = "mean ± half of the 95 % interval over seeds" + (
        ", or [its ends], cut at the limits of the metric" if cut else ""
    )
    return ResultTable(titled(runs, what), ["run", "seeds", *metrics], rows)


def mean_cell(run: Run, metric: str) -> str:
    """Return a metric's mean and interval; where values are not finite, how many of the seeds it is of."""
    values = list(run.values(metric).values())
    if not values:
        return "-" + run.left_out(metric)
    return format_estimate(mean_ci(values), limits=limits_in(run.content, metric)) + run.left_out(metric)


def pairs_cell(run: Run, baseline: Run, metric: str) -> str:
    """Return how many pairs of finite values two runs have; where seeds that both have are left out, of how many."""
    found = len(run.values(metric).keys() & baseline.values(metric).keys())
    shared = len(set(run.seeds_of(metric)) & set(baseline.seeds_of(metric)))
    return str(found) if found == shared else f"{found} of {shared}"


def reference_rows(runs: Sequence[Run], metrics: Sequence[str]) -> list[list[str]]:
    """Return what needs no network: once, or once for each points that runs were judged on."""
    found: dict[str, dict[tuple[str, ...], list[Run]]] = {}
    for r in runs:
        for name, row in r.content["references"].items():
            cells = tuple(f"{row[m]:.4g}" if row.get(m) is not None else "-" for m in metrics)
            if set(cells) != {"-"}:
                found.setdefault(name, {}).setdefault(cells, []).append(r)
    rows = []
    for name, variants in found.items():
        for cells, whose in zip(variants, owners(list(variants.values())), strict=True):
            rows.append([f"reference: {name}{whose}", "", *cells])
    return rows


def owners(variants: Sequence[Sequence[Run]]) -> list[str]:
    """Return whose each of several variants is: the settings that tell them apart, else labels of runs."""
    if len(variants) < 2:
        return [""] * len(variants)
    first = [members[0].settings for members in variants]
    shared = [k for k in differing(first) if all(not differing([{k: r.settings.get(k)} for r in m]) for m in variants)]
    keys = sorted(shared, key=lambda k: not k.startswith("data."))  # it is the data that baselines are of
    names = group_names(keys, first)
    if keys and len(set(names)) == len(names) and not all(map(str.isdigit, names)):
        return [f" ({name})" for name in names]
    return [f" ({members[0].label}{', ...' if len(members) > 1 else ''})" for members in variants]


def titled(runs: Sequence[Run], title: str) -> str:
    """Return a table's title, with the runs' target where there are several."""
    return f"{runs[0].group}: {title}" if runs[0].group else title


def readout_tables(runs: Sequence[Run], metric: str) -> list[ResultTable]:
    """Return a metric of every readout of every run: a table for each set of readouts (for each x0, if wide)."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for r in runs:
        distributions: dict[str, list[str]] = {}
        known = r.readouts(metric)
        for name in known:
            distributions.setdefault(name.split("/")[0] if "/" in name else "", []).append(name)
        for columns in [known] if len(known) <= 4 else distributions.values():
            for i in range(0, len(columns), MAX_COLUMNS):
                groups.setdefault(tuple(columns[i : i + MAX_COLUMNS]), []).append(r)
    tables = []
    for names, members in groups.items():
        rows = []
        for r in members:
            rows.append([r.label, *(mean_cell(r, f"{metric}@{n}") for n in names)])
        distribution = names[0].split("/")[0]
        alike = all(n.startswith(f"{distribution}/") for n in names)
        title = f"{metric} by readout of the same checkpoint"
        if "/" in names[0]:
            title += ", x0 " + (distribution if alike else "zeros or Gaussian")
        heads = [n.split("/")[1] if alike else n.replace("/", " ") for n in names]
        tables.append(ResultTable(titled(runs, title), ["run", *heads], rows))
    return tables


def paired_table(runs: Sequence[Run], baseline: Run) -> ResultTable | None:
    """Return each run's paired differences from the baseline, p-values adjusted by Holm within a metric."""
    rows: list[list[str]] = []
    for metric in baseline.main_metrics:
        found = {
            r.folder: d
            for r in runs
            if r is not baseline and (d := paired_difference(r.values(metric), baseline.values(metric)))
        }
        adjusted = dict(zip(found, holm([d.p_value for d in found.values()]), strict=True))
        for r in [r for r in runs if r is not baseline]:
            pairs = pairs_cell(r, baseline, metric)
            if r.folder in found:
                e = found[r.folder].estimate
                rows.append([r.label, metric, format_estimate(e), interval(e), pairs, f"{adjusted[r.folder]:.2g}"])
            elif " of " in pairs:  # too few are finite: said, since a row that is absent says nothing
                rows.append([r.label, metric, "-", "-", pairs, "-"])
    if not rows:
        return None
    columns = ["run", "metric", "difference", "95 % interval", "pairs", "p (Holm)"]
    return ResultTable(titled(runs, f"paired by seed: run minus {baseline.label}"), columns, rows)


def error_table(runs: Sequence[Run], baseline: Run) -> ResultTable | None:
    """Return geometric means of errors and their ratios to the baseline's, which one bad seed does not carry.

    P-values are adjusted by Holm within a metric, as the differences' are.
    """
    rows: list[list[str]] = []
    for metric in [m for m in baseline.main_metrics if all(m in r.error_metrics for r in runs)]:
        means = {r.folder: e for r in runs if (v := list(r.values(metric).values())) and (e := geometric_ci(v))}
        ratios = {
            r.folder: found
            for r in runs
            if r is not baseline and (found := paired_ratio(r.values(metric), baseline.values(metric)))
        }
        adjusted = dict(zip(ratios, holm([x.p_value for x in ratios.values()]), strict=True))
        for r in runs if means else ():
            left_out = r.left_out(metric)
            if r.folder not in means:
                if left_out and not r.values(metric):
                    rows.append([r.label, metric, f"-{left_out}", *["-"] * 5])
                continue
            cells = [f"{means[r.folder].mean:.4g}{left_out}", interval(means[r.folder])]
            pairs = "-" if r is baseline else pairs_cell(r, baseline, metric)
            if r.folder in ratios:
                d = ratios[r.folder].estimate
                cells += [f"{d.mean:.4g}", interval(d), pairs, f"{adjusted[r.folder]:.2g}"]
            elif " of " in pairs:
                cells += ["-", "-", pairs, "-"]
            rows.append([r.label, metric, *cells, *["-"] * (6 - len(cells))])
    if not rows:
        return None
    columns = ["run", "metric", "geometric mean", "95 % interval", "ratio", "95 % interval", "pairs", "p (Holm)"]
    title = "errors, geometric means over seeds"
    if all(row[4] == "-" for row in rows):  # nothing to be divided by
        return ResultTable(titled(runs, title), columns[:4], [row[:4] for row in rows])
    return ResultTable(titled(runs, f"{title}; ratio: run / {baseline.label}, paired by seed"), columns, rows)


def interval(e: Estimate) -> str:
    """Return an interval's ends; nothing where there is none."""
    return "-" if math.isnan(e.lo) else f"[{e.lo:.4g}, {e.hi:.4g}]"


def to_csv(runs: Sequence[Run]) -> str:
    """Return every metric of every run and reference row, one a line; a name is what a reader of CSV gets back."""
    columns = ["run", "folder", "metric", "readout", "mean", "ci95_lo", "ci95_hi", "replicas", "values"]
    rows: list[list[Any]] = [[*columns, "seeds", "not_finite"]]  # the seeds of the values, and those without one
    for r in runs:
        run, folder = as_text(r.name), as_text(str(r.folder))
        for name in r.content["metrics"]:
            values = r.values(name)
            metric, _, readout = name.partition("@")
            e = mean_ci(list(values.values())) if values else Estimate(math.nan, math.nan, math.nan, 0)
            ends = ["" if math.isnan(x) else x for x in (e.mean, e.lo, e.hi)]
            held = (values.values(), values, [s for s in r.seeds_of(name) if s not in values])
            rows.append([run, folder, metric, readout, *ends, e.n, *(" ".join(map(repr, x)) for x in held)])
        for name, found in r.content["references"].items():
            given = {metric: value for metric, value in found.items() if value is not None}
            rows += [[f"reference: {name} ({run})", folder, m, "", value, *[""] * 6] for m, value in given.items()]
    return "".join(map(csv_line, rows))


def csv_line(row: Sequence[Any]) -> str:
    """Return a line of CSV, in which both characters that may end a line are quoted."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(row)  # it quotes what ends its own lines
    return text.getvalue().removesuffix("\r\n") + "\n"


def as_text(name: str) -> str:
    """Return a name as text; bytes that are none, in the name of a folder, are written out."""
    return name.encode("utf-8", "backslashreplace").decode()
