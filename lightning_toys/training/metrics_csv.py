"""metrics.csv that survives a resume.

Lightning's CSVLogger starts by deleting the file it finds; this one goes on in it.
"""

from __future__ import annotations

import csv
import io
import os
import time
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_toys.training.files import make_folder, set_aside, write_atomic
from lightning_toys.training.metrics_reader import read_csv
from lightning_toys.training.ownership import check_owned


class MetricsCSV(Logger):
    """One row a step, one column a metric; new columns are added when they first appear.

    Args:
        folder: the run folder; the file is ``folder/metrics.csv``.
        resume_step: rows after it, written by a run that was cut off after its last checkpoint, are dropped (the file
            as it was is kept as ``metrics-1.csv``): the resumed run writes them again.
        flush_seconds: rows are kept in memory for so long at most.
    """

    def __init__(self, folder: str | Path, resume_step: int | None = None, flush_seconds: float = 2.0) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.resume_step, self.flush_seconds = resume_step, flush_seconds
        self.columns: list[str] = []
        self.pending: dict[int, dict[str, float]] = {}
        self.opened = False
        self.written = -2  # greatest step on disk
        self.last_flush = time.monotonic()

    @property
    def name(self) -> str:
        """The logger's name."""
        return "csv"

    @property
    def version(self) -> str:
        """The run folder's name."""
        return self.path.parent.name

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsCSV:
        """The logger itself."""
        return self

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of ``step``."""
        self.pending.setdefault(-1 if step is None else step, {}).update(metrics)
        if time.monotonic() - self.last_flush > self.flush_seconds:
            self.save()

    def open(self) -> None:
        """Take up the file of an earlier run in the same folder."""
        self.opened = True
        if not self.path.exists():
            set_aside(self.path)  # a link to nowhere
            return
        rows = read_csv(self.path)
        kept = [r for r in rows if self.resume_step is None or int(r["step"]) <= self.resume_step]
        self.columns = list(dict.fromkeys(k for r in kept for k in r if k != "step"))
        if self.resume_step is not None:  # a validation of an earlier run keeps its own row
            self.written = max((int(r["step"]) for r in kept), default=-2)
        if len(kept) < len(rows) or not self.path.read_text().endswith("\n"):  # nothing may be added to a cut line
            set_aside(self.path)
            self.rewrite(kept)

    def rewrite(self, rows: list[dict[str, str]]) -> None:
        """Write the whole file anew."""
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *self.columns], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        check_owned(self.path)
        write_atomic(Path(os.path.realpath(self.path)), text.getvalue())  # a link stays one

    @rank_zero_only
    def save(self) -> None:
        """Bring the pending rows to disk."""
        self.last_flush = time.monotonic()
        if not self.pending:
            return
        make_folder(self.path.parent)
        if not self.opened:
            self.open()
        rows = [
            {"step": str(step), **{k: repr(float(v)) for k, v in row.items()}}
            for step, row in sorted(self.pending.items())
        ]
        self.pending = {}
        new = [k for k in dict.fromkeys(k for r in rows for k in r) if k != "step" and k not in self.columns]
        again = self.written >= int(rows[0]["step"])  # a flush, or a resume, came between two metrics of one step
        self.written = max(self.written, int(rows[-1]["step"]))
        if new or again or not self.path.exists():
            self.columns += new
            old = read_csv(self.path) if self.path.exists() else []
            merged = {r["step"]: {k: v for k, v in r.items() if v} for r in old}
            for r in rows:
                merged[r["step"]] = merged.get(r["step"], {}) | r
            self.rewrite([merged[s] for s in sorted(merged, key=int)])
            return
        check_owned(self.path)
        with self.path.open("a", newline="") as f:
            csv.DictWriter(f, ["step", *self.columns], restval="", lineterminator="\n").writerows(rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush at the end of a run."""
        self.save()
