"""mine: how well does a small network fit noisy points of a sine? Put your own question here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lightning_toys.errors import bounded
from lightning_toys.nets import ReplicaLinear
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import Batch
from lightning_toys.training.module import ToyModule
from lightning_toys.training.noise import keyed_generator
from lightning_toys.training.results import Report


class MineData(ToyDataModule):
    """Points (x, y) of a sine with noise; every argument is a flag, --data.num_train 20.

    Args:
        num_train: points of each replica.
        noise: standard deviation of the noise on y.
        batch_size: points of one optimiser step.

    Raises:
        ToyError: a number is out of bounds.
    """

    def __init__(self, num_train: int = 32, noise: float = 0.1, batch_size: int = 16) -> None:
        super().__init__(batch_size)
        bounded("--data.num_train", num_train, 1)  # an integer >= 1
        bounded("--data.noise", noise, 0.0)  # a number >= 0
        self.num_train, self.noise = num_train, noise

    def truth(self, x: Tensor) -> Tensor:
        """Return f(x)."""
        return torch.sin(2 * math.pi * x)

    def train_columns(self, seeds: Sequence[int]) -> tuple[Tensor, ...]:
        """Return x and y, each (R, N, 1): every replica draws its own points, by its seed."""
        draws = [keyed_generator(s, 0, "mine/points") for s in seeds]
        x = torch.from_numpy(np.stack([g.random((self.num_train, 1)) for g in draws])).to(self.dtype)
        e = torch.from_numpy(np.stack([g.standard_normal((self.num_train, 1)) for g in draws])).to(self.dtype)
        return x, self.truth(x) + self.noise * e


class Mine(ToyModule):
    """R networks, one a seed, trained at once; every argument is a flag, --model.hidden 64.

    Args:
        seeds: one seed a replica.
        hidden: width of the hidden layer.
        lr: Adam's learning rate.

    Raises:
        ToyError: a number is out of bounds.
    """

    experiment = "mine"  # runs of one experiment lie in one folder, and are compared
    headline = ("rmse",)  # the metrics that a run ends with; test_mine.py reads the first
    error_metrics = ("rmse",)  # positive and different by factors: `compare` adds geometric means and ratios
    metric_labels: Mapping[str, str] = {"rmse": "RMSE on [0, 1]"}

    def __init__(self, seeds: Sequence[int] = (0, 1, 2, 3), hidden: int = 32, lr: float = 0.01) -> None:
        super().__init__(seeds, lr=lr)
        bounded("--model.hidden", hidden, 1)
        self.hidden = hidden
        self.save_hyperparameters(logger=False)  # for load_from_checkpoint

    def measure(self, data: LightningDataModule | None) -> dict[str, Any]:
        """Return what `build` has to know of the data, plain values; checkpoints keep it."""
        return {"inputs": 1, "outputs": 1}

    def build(self) -> nn.Module:
        """Return the network. Every parameter has a leading replica axis, and is drawn by its replica's seed."""
        first = ReplicaLinear(self.local_seeds, "first", self.sizes["inputs"], self.hidden)
        last = ReplicaLinear(self.local_seeds, "last", self.hidden, self.sizes["outputs"])
        return nn.Sequential(first, nn.Tanh(), last)

    def replica_losses(self, batch: Batch, step: int) -> Tensor:
        """Return each replica's loss (R,): a sum over its rows, divided by the rows of the step on all devices."""
        x, y = batch.columns
        errors: Tensor = self.net(x) - y
        return errors.square().sum((1, 2)) / batch.total

    def report(self, stage: str) -> Report:
        """Return what is measured: one value a replica. Called at every validation ("validate") and by `test`."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        x = torch.linspace(0, 1, 201).unsqueeze(1)
        errors = self(x) - data.truth(x).to(self.device)
        return Report(self.seeds, {"rmse": errors.square().mean((1, 2)).sqrt().tolist()})

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return every replica's prediction (R, M, 1) at x (M, 1)."""
        like = next(self.net.parameters())
        prediction: Tensor = self.net(x.to(like).expand(len(self.seeds), -1, -1))
        return prediction
