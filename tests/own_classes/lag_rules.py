"""A rule for the lags' weights and a drift, somebody's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_toys.bilevel import Drift, Found, LagAlgorithm, TimeStep
from lightning_toys.bilevel.regression.mlp import MLP


class Towards(LagAlgorithm):
    """Moves the weights towards one lag: v is the gradient of 1/2 |lambda - L e_lag|^2, L held."""

    def __init__(self, lag: int = 3) -> None:
        self.lag, self.label = lag, f"towards lag {lag}"

    def hypergradient(self, step: TimeStep) -> Found:
        goal = torch.zeros_like(step.lam)
        goal[:, self.lag - 1] = step.lam.sum(1)
        return Found(step.lam - goal)


class Chirp(Drift):
    """A sine whose period shortens and lengthens; only its mean is given."""

    def __init__(self, amplitude: float = 5.0, omega: float = 0.2) -> None:
        self.amplitude, self.omega = amplitude, omega

    def mean(self, t: np.ndarray) -> np.ndarray:
        return self.amplitude * np.sin(self.omega * t + 3 * np.sin(self.omega * t / 10))


class Lopsided(Chirp):
    """Its mean has another shape than the times."""

    def mean(self, t: np.ndarray) -> np.ndarray:
        return super().mean(t).ravel()


class Mixing(Towards):
    """Every replica follows the mean over all."""

    def hypergradient(self, step: TimeStep) -> Found:
        value = super().hypergradient(step).value + step.window.past_y.mean((0, 2, 3)).flip(0)
        return Found(value)


class Overwriting(Towards):
    """Its memory has the name of the last hypergradients, which are averaged."""

    def memory(self, net: MLP, seeds: Sequence[int], sizes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"recent": torch.zeros(len(seeds), 3)}
