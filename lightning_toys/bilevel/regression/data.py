"""The stream as a data module: step t of a run is time t of the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_toys.bilevel.checks import MOST_Y
from lightning_toys.bilevel.regression.drift import Drift, ExactLoss, Sine, WindowLoss, check_drift
from lightning_toys.bilevel.regression.stream import Stream, StreamShape
from lightning_toys.errors import bounded, require
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import DrawnLoader


class Observations(Protocol):
    """What a run reads of a stream of R replicas."""

    def points(self, like: Tensor) -> list[Tensor]:
        """Return the inner points (R, B, p) and the outer ones (R, B', p), in dtype and on the device of ``like``."""

    def window(self, t: int, lags: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the past y at the inner points, oldest first (R, lags, B, d), and step t's at the outer (R, B', d)."""


class StreamData(ToyDataModule):
    """Base of streams.

    Args:
        window: W, the largest lag in the inner problem, in steps.
        shape: the sizes.
    """

    drawn = True

    def __init__(self, window: int, shape: StreamShape) -> None:
        super().__init__(1)
        self.window, self.shape = window, shape

    @property
    def steps(self) -> int | None:
        """How many steps a run can have; None is no end."""
        return None

    @property
    def exact_loss(self) -> WindowLoss:
        """J(w), the outer loss of fixed weights under an exact inner solver."""
        raise NotImplementedError

    def stream(self, seeds: Sequence[int]) -> Observations:
        """Return the streams of the replicas with these seeds."""
        raise NotImplementedError

    def loader(self, seeds: Sequence[int]) -> DrawnLoader:
        """See :meth:`ToyDataModule.loader`: the times; the observations come from the stream."""

        def draw(start: int, stop: int) -> tuple[Tensor, ...]:
            return (torch.arange(start, stop).view(1, -1, 1).expand(len(seeds), -1, 1),)

        return DrawnLoader(draw, 1)


def require_stream(data: LightningDataModule | None) -> StreamData:
    """Return ``data`` if it is a stream.

    Raises:
        ToyError: it is none.
    """
    require(data is not None, "--data: a data module is missing; give DriftStream or CsvStream")
    fits = isinstance(data, StreamData)
    require(fits, f"--data: {type(data).__name__} is not allowed; give DriftStream or CsvStream")
    assert isinstance(data, StreamData)
    return data


class DriftStream(StreamData):
    """y_t(x) = f*(x) + m(t) u + sigma eps_t(x) at fixed points x, half of them inner points, half outer ones.

    Args:
        window: W, the largest lag in the inner problem, in steps.
        drift: m(t).
        noise: sigma, in units of y.
        inputs: p, the dimension of x.
        outputs: d, the dimension of y.
        truth_hidden: hidden units of f*.
        inner_points: B, points of the inner problem.
        outer_points: B', points of the outer problem.

    Raises:
        ToyError: a value is not allowed.
    """

    def __init__(
        self,
        window: int = 60,
        drift: Drift | None = None,
        noise: float = 1.0,
        inputs: int = 5,
        outputs: int = 3,
        truth_hidden: int = 64,
        inner_points: int = 128,
        outer_points: int = 128,
    ) -> None:
        sizes = {
            "window": window,
            "inputs": inputs,
            "outputs": outputs,
            "truth_hidden": truth_hidden,
            "inner_points": inner_points,
            "outer_points": outer_points,
        }
        for name, value in sizes.items():
            minimum = 4 if name.endswith("points") else 1  # an adjoint network holds a quarter of the points out
            bounded(f"--data.{name}", value, minimum, 10_000 if name == "window" else None)  # a matrix of window^2
        bounded("--data.noise", noise, 0.0, MOST_Y)
        fits = drift is None or isinstance(drift, Drift)
        require(fits, f"--data.drift: a {type(drift).__name__} is not allowed; give a Drift, such as Sine")
        self.drift = drift if drift is not None else Sine()
        check_drift(self.drift)
        super().__init__(window, StreamShape(inputs, outputs, truth_hidden, inner_points, outer_points, noise))

    @property
    def exact_loss(self) -> ExactLoss:
        """J(w), the expected outer loss of fixed weights under an exact inner solver."""
        return ExactLoss(self.drift, self.window, self.shape.outputs, self.shape.sigma)

    def stream(self, seeds: Sequence[int]) -> Stream:
        """Return the streams of the replicas with these seeds."""
        return Stream(seeds, self.shape, self.drift)
