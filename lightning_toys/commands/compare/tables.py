"""The tables of a comparison."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from lightning_toys.commands.compare.runs import Run
from lightning_toys.stats import format_estimate, holm, mean_ci, paired_difference

MAX_COLUMNS = 6  # metrics in one table


@dataclass
class ResultTable:
    """A table: a title, column names and rows of words."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """Return it for the terminal."""
        table = Table(title=self.title, title_justify="left", header_style="bold")
        for i, column in enumerate(self.columns):
            if i == 0:
                table.add_column(column, min_width=12, overflow="fold")
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


def metrics_tables(runs: Sequence[Run]) -> list[ResultTable]:
    """Return the configured readouts' metrics, and the reference rows, in tables that are not too wide."""
    metrics = list(dict.fromkeys(m for r in runs for m in r.main_metrics))
    return [metrics_table(runs, metrics[i : i + MAX_COLUMNS]) for i in range(0, len(metrics), MAX_COLUMNS)]


def metrics_table(runs: Sequence[Run], metrics: Sequence[str]) -> ResultTable:
    """Return some of the configured readouts' metrics, and the reference rows."""
    rows = []
    for r in runs:
        cells = [format_estimate(mean_ci(list(v.values()))) if (v := r.values(m)) else "-" for m in metrics]
        rows.append([r.label, str(len(r.content["seeds"])), *cells])
    rows += reference_rows(runs, metrics)
    return ResultTable(titled(runs, "mean ± half of the 95 % interval over seeds"), ["run", "seeds", *metrics], rows)


def reference_rows(runs: Sequence[Run], metrics: Sequence[str]) -> list[list[str]]:
    """Return what needs no network: once, or once for each points that runs were judged on."""
    found: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for r in runs:
        for name, row in r.content["references"].items():
            cells = tuple(f"{row[m]:.4g}" if row.get(m) is not None else "-" for m in metrics)
            if set(cells) != {"-"}:
                found.setdefault(name, {}).setdefault(cells, []).append(r.label)
    rows = []
    for name, variants in found.items():
        for cells, labels in variants.items():
            of = f" ({labels[0]}{', ...' if len(labels) > 1 else ''})" if len(variants) > 1 else ""
            rows.append([f"reference: {name}{of}", "", *cells])
    return rows


def titled(runs: Sequence[Run], title: str) -> str:
    """Return a table's title, with the runs' target where there are several."""
    return f"{runs[0].group}: {title}" if runs[0].group else title


def readout_tables(runs: Sequence[Run], metric: str) -> list[ResultTable]:
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
    tables = []
    for names, members in groups.items():
        rows = []
        for r in members:
            found = [r.values(f"{metric}@{n}") for n in names]
            rows.append([r.label, *(format_estimate(mean_ci(list(v.values()))) if v else "-" for v in found)])
        law = names[0].split("/")[0]
        one_law = all(n.startswith(f"{law}/") for n in names)
        title = f"{metric} by readout of the same checkpoint"
        if "/" in names[0]:
            title += ", x0 " + (law if one_law else "zeros or Gaussian")
        heads = [n.split("/")[1] if one_law else n.replace("/", " ") for n in names]
        tables.append(ResultTable(titled(runs, title), ["run", *heads], rows))
    return tables


def paired_table(runs: Sequence[Run], baseline: Run) -> ResultTable | None:
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
            rows.append([r.label, metric, format_estimate(e), f"[{e.lo:.4g}, {e.hi:.4g}]", str(e.n), f"{p:.2g}"])
    if not rows:
        return None
    columns = ["run", "metric", "difference", "95 % interval", "pairs", "p (Holm)"]
    return ResultTable(titled(runs, f"paired by seed: run minus {baseline.label}"), columns, rows)


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
            row = [r.name, str(r.folder), metric, readout, e.mean, e.lo, e.hi, e.n, " ".join(map(repr, values))]
            writer.writerow(["" if isinstance(x, float) and math.isnan(x) else x for x in row])
        for name, found in r.content["references"].items():
            for metric, value in found.items():
                if value is not None:
                    writer.writerow([f"reference: {name} ({r.name})", str(r.folder), metric, "", value, "", "", "", ""])
    return text.getvalue()
