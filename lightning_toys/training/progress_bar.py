"""The progress of training: optimiser steps, loss and time left, for a terminal, a log file and a notebook."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm


class Progress(Callback):
    """A progress bar with an ETA, fed once a block; a line now and then where the output is no terminal.

    Args:
        line_seconds: time between two lines without a terminal.
        shown: false stays silent, and measures the speed alone.
    """

    def __init__(self, line_seconds: float = 15.0, shown: bool = True) -> None:
        self.line_seconds, self.shown = line_seconds, shown
        self.steps_bar: tqdm[Any] | None = None
        self.start_time = self.last_line = 0.0
        self.start_step = 0
        self.seconds_per_step: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the resumed step."""
        self.start_time = self.last_line = time.monotonic()
        self.start_step = trainer.global_step
        if trainer.is_global_zero and self.shown and sys.stderr.isatty():
            self.steps_bar = tqdm(
                total=trainer.max_steps, initial=trainer.global_step, unit="step", mininterval=0.5, dynamic_ncols=True
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Advance."""
        now, step = time.monotonic(), trainer.global_step
        if self.steps_bar is not None:
            if now - self.last_line > 0.5:
                self.last_line = now
                self.steps_bar.set_postfix_str(f"loss {mean_loss(pl_module):.3g}", refresh=False)
            self.steps_bar.update(step - self.steps_bar.n)
        elif now - self.last_line > self.line_seconds and trainer.is_global_zero and self.shown:
            self.last_line = now
            left = (now - self.start_time) / max(step - self.start_step, 1) * (trainer.max_steps - step)
            line = f"step {step}/{trainer.max_steps}  loss {mean_loss(pl_module):.3g}  {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar and note the speed."""
        taken = trainer.global_step - self.start_step
        if taken:
            self.seconds_per_step = (time.monotonic() - self.start_time) / taken
        self.close_bar()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error stands on a line of its own."""
        self.close_bar()

    def close_bar(self) -> None:
        """Close the bar, if there is one."""
        if self.steps_bar is not None:
            self.steps_bar.close()
            self.steps_bar = None


def mean_loss(module: LightningModule) -> float:
    """Return the last step's loss, the mean over replicas."""
    losses: Any = module.last_losses
    return float(losses.mean())
