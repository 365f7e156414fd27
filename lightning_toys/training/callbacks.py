"""The callback that every run of the command line is steered by: when it is saved, and how it is stopped."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_toys.errors import WHOLE, OwnershipLostError, Stopped, ToyError, bounded, note
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.files import partial_name, put_in_place, set_aside
from lightning_toys.training.module import ToyModule
from lightning_toys.training.ownership import check_owned
from lightning_toys.training.run_folder import RunFolder, read_checkpoint
from lightning_toys.training.validation_clock import crossed, validation_due


class RescueCheckpoint(Callback):
    """Keeps checkpoints/last.ckpt fresh, and checkpoints/best.ckpt where the module's ``best_metric`` is measured.

    ``last`` is written every ``every_n_steps`` steps, at the end, and when SIGINT or SIGTERM asks the run to stop. A
    monitored ModelCheckpoint with ``save_last`` would freeze it at the best step instead. Files are put in place
    whole: a run killed while writing keeps the one before. Weights that are not finite are never written.

    Args:
        every_n_steps: optimiser steps between two writes; 0 for the end only.
        keep: how many older ones are kept beside last.ckpt, as step-00000400.ckpt.
    """

    run: RunFolder

    def __init__(self, every_n_steps: int = 1000, keep: int = 0) -> None:
        bounded("--checkpoint.every_n_steps", every_n_steps, 0, WHOLE)
        bounded("--checkpoint.keep", keep, 0)
        self.every_n_steps, self.keep = every_n_steps, keep
        self.last_step: int | None = None  # that last.ckpt is of
        self.before = 0
        self.best_mean = float("inf")
        self.stop_signal = 0
        self.stopping = False
        self.old_handlers: dict[signal.Signals, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the best mean so far; where large is good, its negative."""
        return {"best_mean": self.best_mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.best_mean = state_dict["best_mean"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the loader where blocks must end."""
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ToyDataModule):
            data.checkpoint_interval = self.every_n_steps

    def take_signals(self) -> None:
        """Answer SIGINT and SIGTERM at the end of a block, where a checkpoint can be exact.

        In place of Lightning's SIGTERM handler, which ends the run at points where no checkpoint has been written.
        """
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.old_handlers[number] = signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: Any) -> None:
        """Ask for a stop; a second SIGINT stops at once."""
        if self.stop_signal and number == signal.SIGINT:
            raise Stopped(number)
        self.stop_signal = number
        note("\nstopping at the end of this block of steps; interrupt again to stop at once")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the handlers back."""
        self.restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the handlers back: after an exception no teardown comes. In a run that is another's, let no logger end.

        Loggers would append what they still hold.
        """
        self.restore_handlers()
        if isinstance(exception, OwnershipLostError):
            trainer.loggers = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the handlers back: figures and results are no place to wait for a block's end."""
        self.restore_handlers()
        if self.stop_signal and trainer.world_size == 1:  # came after the last block
            self.stop(trainer.global_step)

    def restore_handlers(self) -> None:
        """Put the handlers of before the training back."""
        while self.old_handlers:
            signal.signal(*self.old_handlers.popitem())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the resumed step; keep a last.ckpt that is further on than that."""
        self.take_signals()
        self.before = trainer.global_step
        last = self.run.checkpoints / "last.ckpt"
        if trainer.is_global_zero and last.exists() and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                self.last_step = int(str(read_checkpoint(last)["global_step"]))
                further = self.last_step > trainer.global_step
            except (ToyError, KeyError, ValueError):  # damaged: it is in the way all the same
                further = True
            if further:
                self.last_step = None
                set_aside(last)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write last.ckpt where it is due; where validation is due too, :meth:`on_validation_end` writes it."""
        check_owned(self.run.path)
        step = trainer.global_step
        stop = bool(self.stop_signal) or trainer.received_sigterm
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        due = crossed(self.before, step, self.every_n_steps) or step >= trainer.max_steps
        validates = validation_due(trainer, self.before) and trainer.enable_validation
        self.before = step
        if (stop or due) and not validates:
            self.save(trainer, pl_module)
        self.stopping = stop
        if stop and not validates:
            self.stop(step)
        # else the validation that is due comes first: a resumed run would not make up for it

    def stop(self, step: int) -> None:
        """End the run, its checkpoint written."""
        note(f"stopped at step {step}; go on with --ckpt_path {self.run.checkpoints / 'last.ckpt'}")
        raise Stopped(self.stop_signal or signal.SIGTERM, told=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write last.ckpt after each validation within `fit`, and best.ckpt where the module's best metric improved."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, ToyModule)
        found = trainer.callback_metrics.get(pl_module.best_metric)
        score = math.nan if found is None else float(found) * (-1 if pl_module.best_mode == "max" else 1)
        better = score < self.best_mean
        if better:
            self.best_mean = score  # before the checkpoints are written: it is part of them
        self.save(trainer, pl_module)
        if better:
            self.save(trainer, pl_module, "best")
        if self.stopping or (self.stop_signal and trainer.world_size == 1):
            self.stop(trainer.global_step)

    def save(self, trainer: Trainer, pl_module: LightningModule, name: str = "last") -> None:
        """Bring the loggers' rows to disk, then put one whole checkpoint in place."""
        assert isinstance(pl_module, ToyModule)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        pl_module.check_finite_weights()
        path = self.run.checkpoints / f"{name}.ckpt"
        check_owned(path)
        # one name for all ranks, each of which may write its part
        partial = Path(trainer.strategy.broadcast(str(partial_name(path))))
        try:
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero:
                # the rows first: a run killed in between goes on from the checkpoint before, and drops later rows; a
                # checkpoint ahead of its rows would leave a hole in them for good
                for logger in trainer.loggers:
                    logger.save()
                    if isinstance(logger, TensorBoardLogger):
                        logger.experiment.flush()
                self.keep_older(path)
                put_in_place(partial, path)
                if name == "last":
                    self.last_step = trainer.global_step
            # a rank that ended now might have its launcher stop rank 0 before the file is in place
            trainer.strategy.barrier("checkpoint in place")
        except BaseException:  # a full disk, most often: the half of a file is in the way
            if trainer.is_global_zero:
                partial.unlink(missing_ok=True)
            raise

    def keep_older(self, path: Path) -> None:
        """Keep the last.ckpt that is about to be replaced under a name of its own, and ``keep`` of such in all."""
        if not self.keep or path.name != "last.ckpt" or self.last_step is None or not path.exists():
            return
        kept = path.with_name(f"step-{self.last_step:08d}.ckpt")
        check_owned(kept)
        if not kept.exists():
            try:
                os.link(path, kept)
            except OSError:  # a file system without links
                shutil.copy2(path, kept)
        for old in sorted(path.parent.glob("step-*.ckpt"))[: -self.keep]:
            check_owned(old)
            old.unlink()
