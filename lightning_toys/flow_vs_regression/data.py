"""What is learned from and judged on: the base of all point data, and points of a known function on [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_toys.errors import WHOLE, bounded, check_settings, note, require
from lightning_toys.flow_vs_regression.baselines import baseline_predictions
from lightning_toys.flow_vs_regression.targets import Target, Trigonometric
from lightning_toys.flow_vs_regression.units import Units
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import OneBatch
from lightning_toys.training.noise import keyed_generator


class Points(NamedTuple):
    """The points of R replicas, float64, split into N training and H held-out ones.

    Attributes:
        c: training points (R, N, C).
        x1: their values (R, N, D).
        holdout_c: held-out points (R, H, C).
        holdout_x1: their values (R, H, D).
    """

    c: Tensor
    x1: Tensor
    holdout_c: Tensor
    holdout_x1: Tensor


class PointData(ToyDataModule):
    """Base of the data modules: pairs of a condition c (C numbers) and a value x1 (D numbers), and where to predict.

    A subclass sets the attributes without a default and gives :meth:`points`, :meth:`evaluation_points` and
    :meth:`baseline_rows`, all in the data's own units and float64.

    Attributes:
        condition_dim: C.
        output_dim: D.
        num_holdout: training rows of each replica that are held out for ``evaluation.weights: best``.
        target: the function behind the data, which decides on geometric metrics; None where it is not known.
        units: what the network's inputs and outputs are scaled by; None where they are not.
        condition_names: a name for each input, in figures.
        output_names: likewise for each output.
        metric_labels: axis labels of metrics, where the module's own do not fit.
    """

    condition_dim: int = 1
    output_dim: int
    num_holdout: int = 0
    target: Target | None = None
    units: Units | None = None
    condition_names: Sequence[str] = ("c",)
    output_names: Sequence[str] = ()
    metric_labels: Mapping[str, str] = {}

    def points(self, seeds: Sequence[int]) -> Points:
        """Return the training and held-out points of the replicas with these seeds."""
        raise NotImplementedError

    def evaluation_points(self, max_points: int | None = None) -> tuple[Tensor, Tensor]:
        """Return where predictions are judged, c (M, C), and what they should be, (M, D); at most ``max_points``."""
        raise NotImplementedError

    def baseline_rows(self, seeds: Sequence[int], c_eval: Tensor) -> list[dict[str, Tensor]]:
        """Return predictions that need no network at ``c_eval`` (M, C), by name, each (1, 1, M, D).

        One dict a replica, or a single one where all replicas share their points.
        """
        raise NotImplementedError

    def baselines(self, seeds: Sequence[int], c_eval: Tensor) -> list[dict[str, Tensor]]:
        """Return :meth:`baseline_rows`, computed once."""
        cache: dict[tuple[tuple[int, ...], int], list[dict[str, Tensor]]] = self.__dict__.setdefault("kept_rows", {})
        key = (tuple(seeds), c_eval.shape[0])
        if key not in cache:  # they do not change while the networks train, and a GP is slow to fit
            cache[key] = self.baseline_rows(seeds, c_eval)
        return cache[key]

    def train_columns(self, seeds: Sequence[int]) -> tuple[Tensor, ...]:
        """Return c (R, N, C) and x1 (R, N, D) as the network sees them, in the training precision."""
        points = self.points(seeds)
        c, x1 = points.c, points.x1
        if self.units is not None:
            c, x1 = self.units.scaled_c(c), self.units.scaled_x(x1)
        return c.to(self.dtype), x1.to(self.dtype)

    def val_dataloader(self) -> OneBatch:
        """Return one batch: where validations within `fit` predict, at most 1000 points, float32 (M, C)."""
        return OneBatch(self.evaluation_points(1000)[0].float())

    def test_dataloader(self) -> OneBatch:
        """Return one batch: where predictions are judged, float32 (M, C)."""
        return OneBatch(self.evaluation_points()[0].float())

    def predict_dataloader(self) -> OneBatch:
        """See :meth:`test_dataloader`."""
        return self.test_dataloader()


def check_target(target: Target) -> None:
    """Refuse a function of somebody's own that cannot be learned from, before anything is made of it.

    Raises:
        ToyError: names the class, what it lacks or gives, and what is wanted.
    """
    kind = type(target)
    if kind.__module__.startswith("lightning_toys."):
        return
    where = f"--data.target: {kind.__name__}"
    for name in ("__call__", "dim"):
        wanted = "the number of outputs" if name == "dim" else "c (M, 1) to f(c) (M, dim)"
        missing = getattr(kind, name, None) is getattr(Target, name, None) and name not in vars(target)
        require(not missing, f"{where} has no {name}; give it ({wanted})")
    dim: object = target.dim
    whole = isinstance(dim, int) and dim >= 1
    require(whole, f"{where}.dim: {dim!r} is not allowed; give the number of outputs, an integer >= 1")
    highest: object = getattr(target, "highest_frequency", 0.0)
    number = isinstance(highest, int | float)
    require(
        number, f"{where}.highest_frequency: {highest!r} is not allowed; give a number (a property), or leave it out"
    )
    c = torch.linspace(0, 1, 3, dtype=torch.float64).unsqueeze(1)
    try:
        values: object = target(c)
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        require(False, f"{where}.__call__ fails on c (3, 1): {type(error).__name__}: {said}")
    found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    fits = isinstance(values, Tensor) and values.shape == (3, dim)
    require(fits, f"{where}.__call__ maps c (3, 1) to {found}; give a tensor (3, dim) = (3, {dim})")
    assert isinstance(values, Tensor)
    require(values.dtype == torch.float64, f"{where}.__call__ gives {values.dtype} for float64; compute in c's own")
    require(bool(values.isfinite().all()), f"{where}.__call__ is not finite at c = 0, 0.5 or 1")


def highest_frequency(target: Target) -> float:
    """Return a target's highest angular frequency; 0 where it does not say."""
    return float(getattr(target, "highest_frequency", 0.0))


class InterpolationData(PointData):
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
        check_settings(InterpolationData, locals(), "--data.")
        super().__init__(batch_size)
        self.target: Target = target if target is not None else Trigonometric()
        check_target(self.target)
        self.output_dim = self.target.dim
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
        highest = highest_frequency(self.target)
        if stage == "fit" and highest > self.nyquist_frequency:
            note(
                f"the target has frequencies up to {highest:.1f}, and {self.num_train} points "
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

    def grid(self, max_points: int | None = None) -> Tensor:
        """Return the evaluation grid on [0, 1], both ends included: (M, 1), float64; at most ``max_points``."""
        m = self.num_eval if max_points is None else min(self.num_eval, max_points)
        return torch.linspace(0, 1, m, dtype=torch.float64).unsqueeze(1)

    def evaluation_points(self, max_points: int | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`PointData.evaluation_points`: the grid, and the target's values without noise."""
        c = self.grid(max_points)
        return c, self.target(c)

    def baseline_rows(self, seeds: Sequence[int], c_eval: Tensor) -> list[dict[str, Tensor]]:
        """See :meth:`PointData.baseline_rows`; they are :func:`baseline_predictions`."""
        points = self.points(seeds[:1] if self.shared_points else seeds)
        rows = zip(points.c, points.x1, strict=True)
        return [baseline_predictions(c, x1, c_eval, self.noise) for c, x1 in rows]


def point_data(data: LightningDataModule | None) -> PointData:
    """Return ``data`` if it holds pairs to learn from.

    Raises:
        ToyError: it does not.
    """
    give = "give InterpolationData or Table"
    require(data is not None, f"--data: a data module is missing (a DataLoader alone is none); {give}")
    require(isinstance(data, PointData), f"--data: {type(data).__name__} is not allowed; {give}")
    assert isinstance(data, PointData)
    return data
