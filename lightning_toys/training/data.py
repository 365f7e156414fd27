"""ToyDataModule: in-memory data, the same epochs, steps and shares on any strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_toys.errors import bounded, require
from lightning_toys.training.loader import BlockLoader, OneBatch
from lightning_toys.training.module import ToyModule
from lightning_toys.training.replica_parallel import ReplicaStrategy
from lightning_toys.training.validation_clock import validation_interval

MAX_BLOCK = 50  # optimiser steps to a Trainer batch; the Trainer's share of a step is 2 % there, and 30 % at 1


def block_steps(*intervals: int) -> int:
    """Return the most steps (up to 50) that divide every interval at which something happens between blocks."""
    return next(d for d in range(MAX_BLOCK, 0, -1) if all(n % d == 0 for n in intervals))


class ToyDataModule(LightningDataModule):
    """Base of the replica data modules.

    An epoch, as everywhere, is one pass over the training points. The Trainer itself sees one long epoch, since its
    own epochs cost more than a small model's steps; ``--trainer.max_epochs`` is turned into steps.

    Args:
        batch_size: rows of one optimiser step, over all ranks together.
    """

    drawn = False  # whether rows are drawn anew at every step, so that there is no epoch

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        bounded("--data.batch_size", batch_size, 1)
        self.batch_size = batch_size
        self.checkpoint_interval = 0

    @property
    def dtype(self) -> torch.dtype:
        """What training data are held in: float64 where the Trainer trains in it, and float32 else."""
        double = self.trainer is not None and self.trainer.precision == "64-true"
        return torch.float64 if double else torch.float32

    def train_columns(self, seeds: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the training tensors, each (R, N, ...)."""
        raise NotImplementedError

    def loader(self, seeds: Sequence[int]) -> BlockLoader:
        """Return the loader, its length and share still to be set."""
        return BlockLoader(self.train_columns(seeds), seeds, self.batch_size, 1, 1)

    def replica_seeds(self) -> list[int]:
        """Return the seeds of the replicas that this process trains."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        assert isinstance(module, ToyModule)
        return module.local_seeds

    def train_dataloader(self) -> BlockLoader:
        """Return the block loader, cut to the Trainer's steps and to this rank's share."""
        trainer = self.trainer
        assert trainer is not None
        seeds = self.replica_seeds()
        loader = self.loader(seeds)
        epochs, steps = trainer.max_epochs, trainer.max_steps
        if loader.steps_per_pass is None:
            trainer.fit_loop.max_epochs = -1
        elif epochs is not None and epochs > 0:
            wanted = epochs * loader.steps_per_pass
            steps = wanted if steps < 0 else min(steps, wanted)
            trainer.fit_loop.max_epochs = -1
        require(steps >= 0, "--trainer.max_steps: -1 is not allowed; give --trainer.max_steps or --trainer.max_epochs")
        trainer.fit_loop.epoch_loop.max_steps = steps  # a share of the run is a share of these
        interval = validation_interval(trainer)
        intervals = [interval] if interval else []
        if self.checkpoint_interval:
            intervals.append(self.checkpoint_interval)
        # Lightning's own checkpoints at every n steps: no block may jump over one
        savers: list[Any] = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]  # type: ignore[attr-defined]
        intervals += [c._every_n_train_steps for c in savers if c._every_n_train_steps]
        loader.max_steps, loader.block_steps = steps, block_steps(*intervals)
        if not isinstance(trainer.strategy, ReplicaStrategy):  # which shares out no rows
            loader.rank, loader.world_size = trainer.global_rank, trainer.world_size
        return loader

    def val_dataloader(self) -> OneBatch:
        """Return one batch, for data modules whose evaluation draws what it wants by key."""
        return OneBatch(torch.zeros(1))

    def test_dataloader(self) -> OneBatch:
        """See :meth:`val_dataloader`."""
        return OneBatch(torch.zeros(1))

    def predict_dataloader(self) -> OneBatch:
        """See :meth:`val_dataloader`."""
        return OneBatch(torch.zeros(1))
