"""What an evaluation's figures are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lightning_toys.flow_vs_regression.targets import Target
from lightning_toys.plotting import literal, shortened

MAX_POINTS = 2000  # more on a curve than a figure has pixels


@dataclass
class FigureData:
    """What the figures of an evaluation are drawn from.

    Attributes:
        c: evaluation points (M, C).
        truth: what predictions should be (M, D).
        prediction: the configured readout's predictions (R, K, M, D).
        train_c: the first replica's training points (N, C).
        train_x1: their values (N, D).
        baselines: the first replica's baselines, name to (1, 1, M, D).
        target: the target function; None where it is not known.
        arrays: profiles by name, see :func:`compute_metrics`.
        condition_names: a name for each input.
        output_names: a name for each output; without them they are numbered.
    """

    c: Tensor
    truth: Tensor
    prediction: Tensor
    train_c: Tensor
    train_x1: Tensor
    baselines: dict[str, Tensor]
    target: Target | None
    arrays: dict[str, Tensor]
    condition_names: Sequence[str] = ("c",)
    output_names: Sequence[str] = ()

    def output_label(self, d: int) -> str:
        """Return what an axis of output d is called."""
        if self.output_names:
            return literal(shortened(self.output_names[d], 40))
        return "f(c)" if self.truth.shape[1] == 1 else f"output {d}"

    def references(self, *names: str) -> dict[str, np.ndarray]:
        """Return those of these baselines that there are, at the points of :meth:`subsample`, each (m, D)."""
        return {n: self.baselines[n][0, 0, :: self.stride].numpy() for n in names if n in self.baselines}

    @property
    def stride(self) -> int:
        """Every how many points are drawn."""
        return max(1, self.c.shape[0] // MAX_POINTS)

    def subsample(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the first input (m,), truth (m, D) and prediction (R, K, m, D), m < 2 ``MAX_POINTS``."""
        return (
            self.c[:: self.stride, 0].numpy(),
            self.truth[:: self.stride].numpy(),
            self.prediction[:, :, :: self.stride].numpy(),
        )

    def input_label(self, k: int) -> str:
        """Return what an axis of input k is called."""
        return literal(shortened(self.condition_names[k], 40))
