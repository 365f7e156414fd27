"""Which reader an optimiser's state wants: a torch file, or a folder of transformers', DeepSpeed's or torch's (DCP)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_toys.errors import ToyError
from lightning_toys.update_entropy.checkpoints import error_text, flag_error
from lightning_toys.update_entropy.dcp_files import METADATA, read_dcp
from lightning_toys.update_entropy.deepspeed_files import (
    Fit,
    pointed,
    read_universal,
    read_zero,
    universal_folder,
    zero_shards,
)
from lightning_toys.update_entropy.state_formats import OPTIMIZER

FILES = ("optimizer.pt", "optimizer.bin")  # of transformers' Trainer: alone, and with FSDP (FULL_STATE_DICT)
FOLDERS = ("optimizer_0", "optimizer")  # of accelerate with FSDP (SHARDED_STATE_DICT)
SAFE = (
    "save what get_optimizer_state_dict(model, optimizer) of torch.distributed.checkpoint.state_dict returns, or "
    "optimizer.state_dict()"
)


def read_state_file(path: str | Path, fit: Fit) -> Any:
    """Return what a file or a folder of an optimiser's state holds.

    Args:
        path: a torch file; or a folder with optimizer.pt or optimizer.bin, of ``torch.distributed.checkpoint``, of a
            universal checkpoint, or of ZeRO 1 or 2.
        fit: gives a moment that is flat in it the shape of its parameter, by name.

    Raises:
        ToyError: there is nothing of the kind, or it could run code.
    """
    here = Path(path).expanduser()
    if not here.exists():
        raise flag_error(OPTIMIZER, f"{here} is not there; give an optimiser's state_dict, optimizer.pt or a .ckpt")
    if here.is_dir():
        return read_folder(here, fit)
    return load_file(here, path)


def read_folder(folder: Path, fit: Fit) -> Any:
    """Return what a folder holds, see :func:`read_state_file`."""
    for name in FILES:
        if (folder / name).is_file():
            return load_file(folder / name, folder / name)
    for place in (folder, *(folder / name for name in FOLDERS)):
        if (place / METADATA).is_file():
            return orderly(read_dcp, place)
    if found := universal_folder(folder):
        return orderly(read_universal, found, fit)
    for shards in (folder, pointed(folder, "latest")):
        if shards is not None and zero_shards(shards):
            return orderly(read_zero, shards, fit)
    raise flag_error(
        OPTIMIZER,
        f"{folder} holds no optimiser's state; give a folder with optimizer.pt, optimizer.bin, {METADATA} "
        "(torch.distributed.checkpoint), zero/ (DeepSpeed, universal) or *_optim_states.pt (ZeRO 1 and 2)",
    )


def orderly(read: Callable[..., Any], folder: Path, *rest: Any) -> Any:
    """Return ``read(folder, *rest)``; what is wrong with a checkpoint in a way that nothing looks for is one line too.

    Raises:
        ToyError: the checkpoint is not of the form that its names promise.
    """
    try:
        return read(folder, *rest)
    except ToyError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, OSError) as error:
        raise flag_error(OPTIMIZER, f"{folder} is malformed: {error_text(error)}; {SAFE}") from error


def load_file(file: Path, path: str | Path) -> Any:
    """Return what a torch file holds: tensors and plain values.

    Args:
        file: to read.
        path: that was given, for errors.

    Raises:
        ToyError: it cannot be read, or holds something else.
    """
    if not file.is_file():
        raise flag_error(OPTIMIZER, f"{file} is no ordinary file; give an optimiser's state_dict or a .ckpt")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it holds a pickled {found[1]}, which could run code; {SAFE}" if found else error_text(error)
        raise flag_error(OPTIMIZER, f"{path} cannot be read: {why}") from error
