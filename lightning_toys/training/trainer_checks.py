"""What of Lightning's Trainer would do something else than it says: refused, on the command line and in scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_toys.errors import require
from lightning_toys.training.validation_clock import validation_interval

# callbacks that wait for more epochs, for each step, or for Lightning's own
UNSUPPORTED_CALLBACKS: Mapping[type[Callback], str] = {
    StochasticWeightAveraging: "waits for a second epoch; give --model.ema_decay where there is one",
    WeightAveraging: "would average once in many steps; give --model.ema_decay where there is one",
    GradientAccumulationScheduler: "waits for a second epoch; give a larger --data.batch_size",
    LearningRateFinder: "finds none here; sweep over --model.lr",
    BatchSizeFinder: "finds none here; give --data.batch_size",
    LearningRateMonitor: "would look once in many steps; a rate that changes is in metrics.csv, as train/lr",
    DeviceStatsMonitor: "would look once in many steps",
    ThroughputMonitor: "would look once in many steps; results.json has seconds_per_step",
    ProgressBar: "would count batches of many steps each; leave it out: a bar of optimiser steps is shown "
    "(--trainer.enable_progress_bar false hides it)",
}


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that would do nothing, or something else than they say.

    Raises:
        ToyError: names the callback.
    """
    for callback in callbacks:
        why = next((w for kind, w in UNSUPPORTED_CALLBACKS.items() if isinstance(callback, kind)), "")
        require(not why, f"--trainer.callbacks: {type(callback).__name__} is not allowed, it {why}")


def check_precision(precision: str, allowed: Sequence[str]) -> None:
    """Refuse a precision that an experiment cannot run in.

    Args:
        precision: the Trainer's.
        allowed: the module's; () is all but a gradient scaler's.

    Raises:
        ToyError: names the flag and what is allowed.
    """
    require(
        not allowed or precision in (*allowed, *(p.removesuffix("-true") for p in allowed)),
        f"--trainer.precision: {precision!r} is not allowed here; give one of {', '.join(allowed)}",
    )
    require(
        precision not in ("16-mixed", "16"),
        f"--trainer.precision: {precision!r} is not allowed, its gradient scaler is one for all replicas; give "
        "bf16-mixed",
    )


def check_strategy(strategy: Any) -> None:
    """Refuse strategies under which clipping, averaging or a run's settings would be silently wrong.

    Args:
        strategy: the Trainer's setting, a name or an object.

    Raises:
        ToyError: names the flag.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    shards = isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)
    require(
        not shards and not name.startswith(("fsdp", "deepspeed")),
        f"--trainer.strategy: {name!r} is not allowed, it cuts up parameters that each process needs whole; give ddp",
    )
    spawns = isinstance(strategy, DDPStrategy) and getattr(strategy, "_start_method", None) == "spawn"
    require(
        not spawns and "spawn" not in name,
        f"--trainer.strategy: {name!r} is not allowed, its processes know nothing of what this one has set; give ddp",
    )


def check_batches(overfit_batches: Any, limit_train_batches: Any) -> None:
    """Refuse limits that count Trainer batches.

    Raises:
        ToyError: names the flags.
    """
    require(
        overfit_batches == 0 and limit_train_batches in (None, 1.0),
        "--trainer.overfit_batches, --trainer.limit_train_batches: not allowed, a batch of the Trainer's holds "
        "many steps; give --data.num_train or --trainer.max_steps",
    )


def check_running_trainer(trainer: Trainer, precisions: Sequence[str]) -> None:
    """Refuse a Trainer, made in a script or by the command line, that would do something else than it says.

    Args:
        trainer: with its strategy and callbacks in place.
        precisions: the module's; () is all.

    Raises:
        ToyError: names the Trainer's argument as the command line does.
    """
    settings: Any = trainer
    check_precision(str(settings.precision), precisions)
    check_strategy(settings.strategy)
    if not settings.fast_dev_run:
        check_batches(settings.overfit_batches, settings.limit_train_batches)
    validation_interval(trainer)
    check_callbacks(settings.callbacks)
