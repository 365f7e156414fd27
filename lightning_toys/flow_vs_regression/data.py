"""The few training points, and the dense grid for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_toys.errors import WHOLE, bounded, note, require
from lightning_toys.flow_vs_regression.baselines import baseline_predictions
from lightning_toys.flow_vs_regression.targets import Target, Trigonometric
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import OneBatch
from lightning_toys.training.noise import keyed_generator


class Points(NamedTuple):
    """The points of R replicas, float64, split into N training and H held-out ones.

    Attributes:
        c: training points (R, N, 1).
        x1: their values (R, N, D).
        holdout_c: held-out points (R, H, 1).
        holdout_x1: their values (R, H, D).
    """

    c: Tensor
    x1: Tensor
    holdout_c: Tensor
    holdout_x1: Tensor


class InterpolationData(ToyDataModule):
    """N training points (c, f(c)) on [0, 1], and a dense grid for evaluation.

    Where the points or the noise are random, or some points are held out, each replica draws its own by its own seed
    (so that the error bars cover the data too) unless ``seed`` fixes one draw for all.

    Args:
        target: the function f.
        num_train: N, held-out points included.
        num_eval: points of the evaluation grid; validation within `fit` uses at most 1000.
        sampling: ``grid`` (evenly spaced, both ends) or ``random`` (sorted uniform).
        noise: standard deviation of the Gaussian noise added to the training values.
        holdout: share of the training points held out for model selection (``evaluation.weights: best``).
        batch_size: points of one optimiser step; the last batch of an epoch is kept.
        seed: fixes points, noise and hold-out for all replicas.

    Raises:
        ToyError: a value is not allowed, or fewer than two points are left to learn from.

    Example:
        >>> data = InterpolationData(num_train=10, holdout=0.2)
        >>> points = data.points([0, 1])
        >>> points.c.shape, points.x1.shape, points.holdout_c.shape
        (torch.Size([2, 8, 1]), torch.Size([2, 8, 1]), torch.Size([2, 2, 1]))
    """

    def __init__(
        self,
        target: Target | None = None,
        num_train: int = 50,
        num_eval: int = 1000,
        sampling: Literal["grid", "random"] = "grid",
        noise: float = 0.0,
        holdout: float = 0.0,
        batch_size: int = 32,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size)
        self.target = target if target is not None else Trigonometric()
        if seed is not None:
            bounded("--data.seed", seed, 0, WHOLE)
        bounded("--data.num_train", num_train, 2)
        bounded("--data.num_eval", num_eval, 2)
        bounded("--data.noise", noise, 0.0)
        require(0 <= holdout < 1, f"--data.holdout: {holdout} is not allowed; give a share in [0, 1)")
        self.num_holdout = round(holdout * num_train)
        require(
            num_train - self.num_holdout >= 2,
            f"--data.holdout: {holdout} leaves {num_train - self.num_holdout} of {num_train} points to learn from; "
            "at least 2",
        )
        require(
            holdout == 0 or self.num_holdout >= 1,
            f"--data.holdout: {holdout} of {num_train} points is none; give more, or 0",
        )
        self.baseline_cache: dict[tuple[tuple[int, ...], int], list[dict[str, Tensor]]] = {}
        self.num_train, self.num_eval, self.sampling, self.noise, self.seed = num_train, num_eval, sampling, noise, seed

    @property
    def shared_points(self) -> bool:
        """Whether all replicas learn from the same points."""
        return self.seed is not None or (self.sampling == "grid" and self.noise == 0 and self.num_holdout == 0)

    @cached_property
    def nyquist_frequency(self) -> float:
        """The highest angular frequency that N evenly spaced points resolve, pi (N - 1) radians per unit of c."""
        return float(np.pi * (self.num_train - 1))

    def setup(self, stage: str) -> None:
        """Print a note where the points cannot resolve the target's highest frequency."""
        if stage == "fit" and self.target.highest_frequency > self.nyquist_frequency:
            note(
                f"the target has frequencies up to {self.target.highest_frequency:.1f}, and {self.num_train} points "
                f"resolve up to {self.nyquist_frequency:.1f}: no method can be expected to interpolate it"
            )

    def points(self, seeds: Sequence[int]) -> Points:
        """Return the training and held-out points of the replicas with these seeds."""
        return Points(*(torch.stack(x) for x in zip(*(self._draw(s) for s in seeds), strict=True)))

    def _draw(self, seed: int) -> Points:
        key = seed if self.seed is None else self.seed
        n = self.num_train
        c = torch.linspace(0, 1, n, dtype=torch.float64)
        if self.sampling == "random":
            c = torch.from_numpy(np.sort(keyed_generator(key, 0, "data/points").random(n)))
        c = c.unsqueeze(1)
        x1 = self.target(c)
        if self.noise > 0:
            x1 = x1 + self.noise * torch.from_numpy(keyed_generator(key, 0, "data/noise").standard_normal(x1.shape))
        holdout = np.zeros(n, dtype=bool)
        holdout[keyed_generator(key, 0, "data/holdout").choice(n, self.num_holdout, replace=False)] = True
        h = torch.from_numpy(holdout)
        return Points(c[~h], x1[~h], c[h], x1[h])

    def train_columns(self, seeds: Sequence[int]) -> tuple[Tensor, ...]:
        """Return c (R, N, 1) and x1 (R, N, D) in the training precision."""
        points = self.points(seeds)
        return points.c.to(self.dtype), points.x1.to(self.dtype)

    def grid(self, max_points: int | None = None) -> Tensor:
        """Return the evaluation grid on [0, 1], both ends included: (M, 1), float64; at most ``max_points``."""
        m = self.num_eval if max_points is None else min(self.num_eval, max_points)
        return torch.linspace(0, 1, m, dtype=torch.float64).unsqueeze(1)

    def baselines(self, seeds: Sequence[int], c_eval: Tensor) -> list[dict[str, Tensor]]:
        """Return :func:`baseline_predictions` at ``c_eval`` (M, 1), by name, each (1, 1, M, D).

        One dict a replica, or a single one where all replicas share their points.
        """
        key = (tuple(seeds), c_eval.shape[0])
        if key not in self.baseline_cache:  # they do not change while the networks train, and a GP is slow to fit
            points = self.points(seeds[:1] if self.shared_points else seeds)
            rows = zip(points.c, points.x1, strict=True)
            self.baseline_cache[key] = [baseline_predictions(c, x1, c_eval, self.noise) for c, x1 in rows]
        return self.baseline_cache[key]

    def val_dataloader(self) -> OneBatch:
        """Return one batch: at most 1000 points of the grid, float32 (M, 1)."""
        return OneBatch(self.grid(1000).float())

    def test_dataloader(self) -> OneBatch:
        """Return one batch: the grid, float32 (M, 1)."""
        return OneBatch(self.grid().float())

    def predict_dataloader(self) -> OneBatch:
        """Return one batch: the grid, float32 (M, 1)."""
        return OneBatch(self.grid().float())
