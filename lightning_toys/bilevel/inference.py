"""Calling a module outside a Trainer: inputs with or without a replica axis, and weights in their own precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_toys.errors import require


def require_built(module: nn.Module) -> None:
    """Raise a ToyError unless the module's networks are built."""
    name = type(module).__name__
    require(
        hasattr(module, "net"),
        f"{name} has no networks yet; give {name}.load_from_checkpoint(path), fit it, or call "
        "module.sizes = module.measure(data) and module.configure_model()",
    )


def with_replica_axis(x: Tensor, replicas: int, sizes: tuple[int, ...], name: str) -> Tensor:
    """Return ``x`` (R, M, *sizes), given so or as (M, *sizes), the same for every replica.

    Args:
        x: a tensor, or what torch makes one of.
        replicas: R.
        sizes: of a single input.
        name: of the argument, for the error.

    Raises:
        ToyError: the shape is another one.

    >>> with_replica_axis(torch.zeros(7, 4), 2, (4,), "x").shape
    torch.Size([2, 7, 4])
    """
    x = torch.as_tensor(x)
    shared = x.dim() == 1 + len(sizes) and x.shape[1:] == sizes
    own = x.dim() == 2 + len(sizes) and x.shape[0] == replicas and x.shape[2:] == sizes
    tail = "".join(f", {n}" for n in sizes)
    require(
        shared or own,
        f"{name}: shape {tuple(x.shape)} is not allowed; give (M{tail or ','}) or ({replicas}, M{tail})",
    )
    return x.expand(replicas, *x.shape) if shared else x


def use_stored_precision(module: nn.Module, checkpoint: dict[str, Any], weight: str) -> None:
    """Cast a module to the precision of a checkpoint's ``weight``: loading alone would round doubles to the module's.

    Args:
        module: built.
        checkpoint: as Lightning saves it.
        weight: name in its state dict.
    """
    module.to(checkpoint["state_dict"][weight].dtype)
