"""Replicas shared out over processes: each trains some of the seeds, and no gradient is ever exchanged.

What belongs to all replicas (checkpoints, logged rows, whatever is judged) is gathered, so that a run's folder is that
of one process and can be gone on with by any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

Parallel = Literal["batch", "replicas"]


class ReplicaStrategy(DDPStrategy):
    """Lightning's processes, ranks and devices of DDP, without DDP's wrapper: there is nothing to average."""

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


def share(replicas: int, rank: int, world: int) -> slice:
    """Return the contiguous part of the replicas that a rank trains; parts differ by one at most."""
    return slice(replicas * rank // world, replicas * (rank + 1) // world)


def gathered(part: Tensor, replicas: int, dim: int = 0) -> Tensor:
    """Return the parts of all ranks side by side along ``dim``, on every rank.

    Args:
        part: this rank's, with its :func:`share` of the replicas along ``dim``.
        replicas: how many there are in all.
        dim: the replica axis.
    """
    world = dist.get_world_size()
    moved = part.detach().movedim(dim, 0)
    most = -(-replicas // world)
    padded = moved.new_zeros((most, *moved.shape[1:]))
    padded[: len(moved)] = moved
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    sizes = [len(range(*share(replicas, r, world).indices(replicas))) for r in range(world)]
    return torch.cat([p[:n] for p, n in zip(parts, sizes, strict=True)]).movedim(0, dim)


def with_states(
    checkpoint: dict[str, Any], names: Container[str], change: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Return a checkpoint's ``state_dict`` and ``optimizer_states`` with what the replicas own changed.

    Args:
        checkpoint: a Trainer's.
        names: of the entries of ``state_dict`` that have a replica axis.
        change: gathers tensors, or cuts them; not asked for an optimiser's numbers without axes, which all share.
    """

    def moved(state: dict[str, Any]) -> dict[str, Any]:
        return {k: change(v) if isinstance(v, Tensor) and v.dim() else v for k, v in state.items()}

    weights = {k: change(v) if k in names else v for k, v in checkpoint["state_dict"].items()}
    optimizers = [
        {**o, "state": {i: moved(state) for i, state in o["state"].items()}} for o in checkpoint["optimizer_states"]
    ]
    return {"state_dict": weights, "optimizer_states": optimizers}
