"""What of Lightning's Trainer would do here something else than it says, or nothing: refused, and what to give instead.

The Trainer sees one long epoch, in which each of its batches holds many optimiser steps.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, get_args, get_type_hints

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback, Timer

from lightning_toys.commands.trainer.parser import TYPES
from lightning_toys.errors import bounded, did_you_mean, note, require
from lightning_toys.training.compiling import check_compiler
from lightning_toys.training.module import ToyModule
from lightning_toys.training.monitors import monitoring
from lightning_toys.training.reporting import SHOWING, FigureWriter
from lightning_toys.training.trainer_checks import check_batches, check_callbacks, check_precision, check_strategy

# a flag of the Trainer's, the values that are allowed, and why the others are not
RULES: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("gradient_clip_val", (None,), "would clip replicas together; give --model.clip_grad_norm"),
    ("gradient_clip_algorithm", (None, "norm"), "each replica is clipped by its norm; give --model.clip_grad_norm"),
    ("accumulate_grad_batches", (1,), "only 1 is; give a larger --data.batch_size"),
    ("check_val_every_n_epoch", (None, 1), "a run is one epoch; give --trainer.val_check_interval"),
    ("min_epochs", (None, 0), "a run is one epoch; give --trainer.min_steps"),
    ("enable_checkpointing", (None, True), "last.ckpt is always kept; give --checkpoint.every_n_steps"),
    ("default_root_dir", (None,), "give --run.root"),
    ("use_distributed_sampler", (False,), "each process takes its share of every batch by itself"),
    ("barebones", (False,), "a run keeps its results; give --trainer.logger false and --figures.enabled false"),
    ("reload_dataloaders_every_n_epochs", (0,), "a run is one epoch, and its data are in memory"),
)


def check_trainer(trainer: Namespace, module: ToyModule, data: LightningDataModule | None, verb: str) -> None:
    """Refuse settings of the Trainer that would do here something else than they say.

    Raises:
        ToyError: names the flag.
    """
    check_given(trainer)
    check_machine(trainer)
    check_time(trainer.get("max_time"))
    precision = str(trainer.precision or "32-true")
    check_precision(precision, module.precisions)
    plugins = trainer.get("plugins")
    given = plugins if isinstance(plugins, list) else [plugins]
    require(
        not any(getattr(p, "scaler", None) for p in given),
        f"--trainer.precision: {precision!r} is not allowed, its gradient scaler is one for all replicas; give "
        "bf16-mixed",
    )
    for flag, values, why in RULES:
        value = trainer.get(flag)
        require(value in values, f"--trainer.{flag}: {value!r} is not allowed, {why}")
    check_strategy(trainer.strategy)
    check_batches(trainer.overfit_batches, trainer.limit_train_batches)
    every = trainer.log_every_n_steps
    require(every is None or every >= 0, f"--trainer.log_every_n_steps: {every} is not allowed; give an integer >= 0")
    every = trainer.val_check_interval
    require(
        isinstance(every, int) and every >= 1,
        f"--trainer.val_check_interval: {every!r} is not allowed; give optimiser steps, an integer >= 1",
    )
    limit = f"limit_{'val' if verb == 'validate' else verb}_batches"
    require(
        verb == "fit" or trainer.get(limit) in (None, 1, 1.0),
        f"--trainer.{limit}: {trainer.get(limit)} is not allowed with {verb}, all is judged in one batch",
    )
    check_callbacks(callbacks_of(trainer))
    if verb == "fit":
        check_fit(trainer, module, data)


def check_given(trainer: Namespace) -> None:
    """Refuse null for what the Trainer wants a value: a configuration's null is let through as a missing one.

    Raises:
        ToyError: names the flag.
    """
    for name, hint in get_type_hints(Trainer.__init__).items():
        kinds = {type(None)} if hint is type(None) else set(get_args(hint)) or {hint}
        missing = name in trainer and trainer[name] is None and type(None) not in kinds
        words = " or ".join(sorted({TYPES.get(k.__name__, k.__name__) for k in kinds if isinstance(k, type)}))
        require(not missing, f"--trainer.{name}: null is not allowed; give {words}")


PROFILERS = ("simple", "advanced", "pytorch")  # xla's, where its package is not, ends in a traceback
MANY = 4096  # processes on one machine, and machines


def check_machine(trainer: Namespace) -> None:
    """Refuse an accelerator that is not here, and numbers of devices and nodes that nobody has.

    Raises:
        ToyError: names the flag.
    """
    known, given = AcceleratorRegistry, trainer.accelerator
    if isinstance(given, str) and given not in ("auto", "gpu"):
        names = ("auto", "gpu", *known.available_accelerators())
        hint = did_you_mean(given, names)
        require(
            given in names,
            f"--trainer.accelerator: {given!r} is not allowed; give one of {', '.join(names)}{hint}",
        )
    if isinstance(given, str) and given != "auto":
        kinds = ("cuda", "mps") if given == "gpu" else (given,)
        here = any(known[k]["accelerator"].is_available() for k in kinds)
        require(here, f"--trainer.accelerator: {given!r} is not allowed, there is none here; give auto or cpu")
    profiler = trainer.get("profiler")
    named = not isinstance(profiler, str) or profiler in PROFILERS
    require(named, f"--trainer.profiler: {profiler!r} is not allowed; give one of {', '.join(PROFILERS)}")
    devices = trainer.devices
    if isinstance(devices, int) and devices != -1:
        bounded("--trainer.devices", devices, 1, MANY)
    bounded("--trainer.num_nodes", trainer.num_nodes, 1, MANY)


def check_time(given: Any) -> None:
    """Refuse a time that is none, or that no clock holds.

    Raises:
        ToyError: names the flag.
    """
    try:
        seconds = Timer(duration=given).time_remaining()
    except (MisconfigurationException, OverflowError, TypeError, ValueError):
        seconds = -1.0
    allowed = seconds is None or seconds > 0
    require(allowed, f"--trainer.max_time: {given!r} is not allowed; give DD:HH:MM:SS, more than 00:00:00:00")


def check_fit(trainer: Namespace, module: ToyModule, data: LightningDataModule | None) -> None:
    """Refuse, or tell of, what matters to training alone."""
    if module.compiles:
        check_compiler("--model.compile")
        torch.compiler.reset()  # else the cells of a sweep before this one count towards its limit of shapes
    if trainer.limit_val_batches in (0, 0.0):
        names = [type(c).__name__ for c in monitoring(callbacks_of(trainer))]
        require(
            not names, f"--trainer.limit_val_batches: 0 is not allowed with {' and '.join(names)}, which waits for it"
        )
    if getattr(data, "drawn", False) and not trainer.fast_dev_run:
        why = "the data are drawn anew at every step"
        require(trainer.max_steps >= 0, f"--trainer.max_steps: -1 is not allowed, {why}; give a number")
        require(
            trainer.max_epochs in (None, -1),
            f"--trainer.max_epochs: {trainer.max_epochs} is not allowed, {why}; give --trainer.max_steps",
        )


def check_figures(figures: FigureWriter, logger: Any) -> None:
    """Refuse pictures of validations where nobody shows them.

    Args:
        figures: their settings.
        logger: the Trainer's setting; with None or True there is TensorBoard.

    Raises:
        ToyError: names the flag.
    """
    boards = logger in (None, True) or any(
        isinstance(x, SHOWING) for x in (logger if isinstance(logger, list) else [logger])
    )
    require(
        boards or not figures.enabled or not figures.every_n_validations,
        f"--figures.every_n_validations: {figures.every_n_validations} is not allowed without a logger that shows "
        "them, such as TensorBoardLogger; give 0",
    )


def note_unused(trainer: Namespace, module: ToyModule, verb: str, given: Collection[str]) -> None:
    """Tell the user of what is allowed and does nothing.

    Args:
        trainer: its settings.
        module: the model.
        verb: what is run.
        given: flags of the command line.
    """
    if verb == "fit" and trainer.limit_val_batches in (0, 0.0) and not trainer.fast_dev_run:
        note("--trainer.limit_val_batches 0: no validation, and so no results.json; the verb test writes one")
    unused = module.unused_settings()
    for flag in (f.replace(".init_args", "") for f in given):
        for name, wants in unused.items():
            if flag == name or flag.startswith(name if name.endswith(".") else f"{name}."):
                note(f"{flag} does nothing here: it wants {wants}")
                break


def callbacks_of(trainer: Namespace) -> list[Callback]:
    """Return the user's callbacks."""
    given = trainer.callbacks
    return [c for c in (given if isinstance(given, list) else [given]) if c is not None]
