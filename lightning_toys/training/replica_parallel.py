"""Replicas shared out over processes: each trains some of the seeds, and no gradient is ever exchanged.

What belongs to all replicas (checkpoints, logged rows, whatever is judged) is gathered, so that a run's folder is that
of one process and can be gone on with by any number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

Parallel = Literal["batch", "replicas"]


class ReplicaStrategy(DDPStrategy):
    """Lightning's processes, ranks and devices of DDP, without DDP's wrapper: there is nothing to average."""

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


def share(replicas: int, rank: int, world_size: int) -> slice:
    """Return the contiguous part of the replicas that a rank trains; parts differ by one at most."""
    return slice(replicas * rank // world_size, replicas * (rank + 1) // world_size)


def gathered(part: Tensor, replicas: int, dim: int = 0) -> Tensor:
    """Return the parts of all ranks side by side along ``dim``, on every rank.

    Args:
        part: this rank's, with its :func:`share` of the replicas along ``dim``.
        replicas: how many there are in all.
        dim: the replica axis.
    """
    world_size = dist.get_world_size()
    moved = part.detach().movedim(dim, 0)
    most = -(-replicas // world_size)
    padded = moved.new_zeros((most, *moved.shape[1:]))
    padded[: len(moved)] = moved
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    sizes = [len(range(*share(replicas, r, world_size).indices(replicas))) for r in range(world_size)]
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


class ReplicaParallel(LightningModule):
    """A module of replicas of which this process may train some only.

    Attributes:
        seeds: of all replicas.
        local_replicas: which of them this process trains.
        net: their networks; ``ema_net`` and ``best_net`` are copies, where they are wanted.
        best_score: of each replica, lower is better.
    """

    seeds: list[int]
    local_replicas: slice
    net: nn.Module
    ema_net: nn.Module | None
    best_net: nn.Module | None
    best_score: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.ema_net, self.best_net = None, None
        self.aside: dict[str, Any] | None = None  # this process's own replicas, while all are at hand

    @property
    def local_seeds(self) -> list[int]:
        """The seeds of the replicas that this process trains: all, unless processes share the replicas out."""
        return self.seeds[self.local_replicas]

    @property
    def in_training(self) -> bool:
        """Whether the verb is `fit`."""
        return self.trainer.state.fn == "fit"

    @property
    def shares_replicas(self) -> bool:
        """Whether this process has some of the replicas only."""
        return len(self.local_seeds) < len(self.seeds)

    @property
    def replica_names(self) -> set[str]:
        """Names of what has a replica axis in a state dict: every parameter, and the best scores."""
        return {n for n, _ in self.named_parameters()} | {"best_score"}

    def gather_replicas(self, values: Tensor, dim: int = 0) -> Tensor:
        """Return values of every replica, given those of this process's own along ``dim``."""
        return gathered(values, len(self.seeds), dim) if self.shares_replicas else values

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Put all replicas together while they are judged, so that one process's report and figures come out."""
        if self.shares_replicas:
            own = {n: m for n, m in self.named_children() if n in ("net", "ema_net", "best_net") and m is not None}
            self.aside = {**own, "best_score": self.best_score}
            for name, part in own.items():
                whole = copy.deepcopy(part)
                for p in whole.parameters():
                    p.data = gathered(p.data, len(self.seeds))
                setattr(self, name, whole)
            self.best_score = gathered(self.best_score, len(self.seeds))

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Go back to this process's own replicas, with what the judgement found to be their best."""
        if self.aside is None:
            return
        own, self.aside = self.aside, None
        self.best_score = self.best_score[self.local_replicas].clone()
        if self.best_net is not None:
            for p, q in zip(own["best_net"].parameters(), self.best_net.parameters(), strict=True):
                p.data.copy_(q.data[self.local_replicas])
        for name in own.keys() - {"best_score"}:
            setattr(self, name, own[name])
