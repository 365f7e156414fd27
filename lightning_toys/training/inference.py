"""Calling a module outside of a Trainer: inputs with or without a replica axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_toys.errors import require


def require_built(module: nn.Module) -> None:
    """Raise a ToyError unless the module's networks are built."""
    name = type(module).__name__
    require(
        hasattr(module, "net"),
        f"{name} has no networks yet: train it, or read it by {name}.load_from_checkpoint(path), or for initial "
        "weights set module.sizes = module.measure(data) and call module.configure_model()",
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
