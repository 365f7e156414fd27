"""What a run said and when, in words: train.log in its folder."""

from __future__ import annotations

import os
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_toys import __version__
from lightning_toys.errors import LISTENERS, OwnershipLostError, Stopped, one_line
from lightning_toys.stats import format_estimate, mean_ci
from lightning_toys.training.files import make_folder, set_aside
from lightning_toys.training.module import ToyModule
from lightning_toys.training.ownership import check_owned
from lightning_toys.training.reporting import Reporter
from lightning_toys.training.results import Report, limits_of

NAME = "train.log"
TIME = "%Y-%m-%d %H:%M:%S%z"  # local, with its distance from UTC


def headlines(report: Report, module: ToyModule) -> str:
    """Return a report's metrics that a module leads with, those it has, each with half of its 95 % interval."""
    found = {n: report.metrics[n] for n in module.headline if n in report.metrics}
    limits = {n: limits_of(n, module.error_metrics, n in report.shares) for n in found}
    return ", ".join(f"{n} {format_estimate(mean_ci(v), limits=limits[n])}" for n, v in found.items())


def summary(report: Report, module: ToyModule) -> str:
    """Return :func:`headlines` in one line that says what the numbers are."""
    seeds = len(report.seeds)
    what = f"{seeds} seed{'s' if seeds > 1 else ''}{'; ± half of the 95 % interval' * (seeds > 1)}"
    return f"{headlines(report, module)} ({what})"


@contextmanager
def heard_by(listener: Callable[[str], None]) -> Iterator[None]:
    """Tell a listener of all notes and warnings within a block; they are printed as ever."""
    before = warnings.showwarning

    def shown(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        listener(f"warning: {message}")
        before(message, category, filename, lineno, file, line)

    LISTENERS.append(listener)
    warnings.showwarning = shown
    try:
        yield
    finally:
        LISTENERS.remove(listener)
        if warnings.showwarning is shown:
            warnings.showwarning = before


class TrainLog(Reporter):
    """Writes train.log: the command, notes and warnings, each validation's headline metrics, how the verb ended.

    A line is a time and what happened then; a later verb, or a resumed run, adds its own. A log that cannot be written
    ends no run: what else is written there says what is wrong.

    Args:
        command: words of the command line, if it was one.
    """

    def __init__(self, command: Sequence[str] = ()) -> None:
        self.command = list(command)
        self.place: Path | None = None
        self.waiting: list[str] = []  # what was said before the folder was known
        self.began = 0.0

    def hear(self, message: str) -> None:
        """Write what was said, each line of it as one; before the verb has begun it is kept until then."""
        for words in filter(str.strip, message.splitlines()):
            line = f"{time.strftime(TIME)} {words}\n"
            if self.place is None:
                self.waiting.append(line)
            else:
                self.write(line)

    def write(self, text: str) -> None:
        """Add to the file, unless the run has become somebody else's."""
        assert self.place is not None
        with suppress(OSError, OwnershipLostError):
            check_owned(self.place)
            if os.path.lexists(self.place) and not self.place.is_file():  # a FIFO would wait for a reader
                set_aside(self.place)
            make_folder(self.place.parent)
            with self.place.open("a", encoding="utf-8") as file:
                file.write(text)

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Write what begins."""
        assert isinstance(module, ToyModule)
        dry = trainer.fast_dev_run or not trainer.is_global_zero  # type: ignore[attr-defined]
        if dry or not module.keeps_files:
            return
        self.place, self.began = self.folder(module) / NAME, time.monotonic()
        early, self.waiting = self.waiting, []
        stage = trainer.state.fn.value if trainer.state.fn else "a verb"
        what = f"lightning-toys {shlex.join(self.command)}" if self.command else f"{stage} from a script"
        self.hear(f"{what} (version {__version__}, torch {torch.__version__}, {trainer.strategy.root_device})")
        self.hear(f"{type(module).__name__}, seeds {', '.join(map(str, module.seeds))}")
        for line in early:
            self.write(line)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what begins."""
        self.begin(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what begins, where it is no part of `fit`."""
        if trainer.state.fn == "validate":
            self.begin(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what begins."""
        self.begin(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what begins."""
        self.begin(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the headline metrics of a validation within `fit`, and all that ends `validate`."""
        super().on_validation_end(trainer, pl_module)
        if self.place is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, ToyModule)
        if pl_module.last_report is not None:
            self.hear(f"step {trainer.global_step}: {headlines(pl_module.last_report, pl_module)}")

    def report(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write how `fit`, `validate` or `test` ended."""
        assert isinstance(pl_module, ToyModule)
        found = pl_module.last_report
        self.ended(pl_module, stage, f": {summary(found, pl_module)}" if found is not None else "")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that `predict` ended."""
        assert isinstance(pl_module, ToyModule)
        self.ended(pl_module, "predict", "")

    def ended(self, module: ToyModule, stage: str, found: str) -> None:
        """Write that a verb has ended, at which step, and how long it took."""
        if self.place is not None:
            self.hear(f"{stage} ended at step {module.weights_step} after {time.monotonic() - self.began:.1f} s{found}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what ended the run too early; a signal's stop has been noted already."""
        told = isinstance(exception, Stopped) and exception.told
        if self.place is not None and not told:
            words = one_line(exception)
            self.hear(f"error: {type(exception).__name__}{f': {words}' if words else ''}")
