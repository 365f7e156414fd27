"""Samples of the linear-Gaussian joint distribution of (a, s')."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_toys.mirror_descent.joint import LinearGaussianJoint
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import DrawnLoader
from lightning_toys.training.noise import NoiseStream


class LinearGaussian(ToyDataModule):
    """a ~ N(mu_a, sigma_a^2), s' ~ N(alpha a + d s + mu_eps, sigma_sprime^2); fresh pairs at every step.

    Args:
        mu_a: mean of the action.
        sigma_a: its standard deviation.
        alpha: slope of the next state on the action.
        sigma_sprime: standard deviation of the next state given the action.
        d: slope of the next state on the state.
        s: the state, which is fixed.
        mu_eps: mean of the dynamics' noise.
        batch_size: pairs of one optimiser step, over all ranks together.

    Raises:
        ToyError: a value is not allowed.
    """

    drawn = True

    def __init__(
        self,
        mu_a: float = 0.0,
        sigma_a: float = 1.0,
        alpha: float = 1.0,
        sigma_sprime: float = 0.5,
        d: float = 0.0,
        s: float = 0.0,
        mu_eps: float = 0.0,
        batch_size: int = 256,
    ) -> None:
        super().__init__(batch_size)
        self.joint = LinearGaussianJoint(mu_a, sigma_a, alpha, sigma_sprime, d, s, mu_eps)

    def loader(self, seeds: Sequence[int]) -> DrawnLoader:
        """See :meth:`ToyDataModule.loader`: one column, pairs (R, batch_size, 2) a step, keyed by (seed, step)."""
        noise, like = NoiseStream(seeds, "data/pair", (self.batch_size, 2)), torch.zeros(1)

        def draw(start: int, stop: int) -> tuple[Tensor, ...]:
            return (self.pairs(torch.stack([noise.at(step, like) for step in range(start, stop)], dim=1)),)

        return DrawnLoader(draw, self.batch_size)

    def pairs(self, z: Tensor) -> Tensor:
        """Turn standard normals (..., 2) into pairs (a, s') (..., 2)."""
        joint = self.joint
        a = joint.mu_a + joint.sigma_a * z[..., :1]
        return torch.cat([a, joint.alpha * a + joint.shift + joint.sigma_sprime * z[..., 1:]], dim=-1)
