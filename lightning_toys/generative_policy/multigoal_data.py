"""States and steps of the plane with four goals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_toys.errors import bounded
from lightning_toys.generative_policy.multigoal import MultiGoal
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import DrawnLoader
from lightning_toys.training.noise import NoiseStream, uniform


class MultiGoalData(ToyDataModule):
    """Fresh uniform states and steps of :class:`MultiGoal`, at every optimiser step, keyed by (seed, step).

    Args:
        horizon: T, steps of an episode.
        temperature: alpha, the weight of the entropy in the soft return.
        reach: length of the longest step along a coordinate.
        width: of a goal.
        cost: of an action.
        grid: points along an axis of the states' grid, on which the optimum is computed.
        nodes: of the quadrature along an axis of the actions.
        start_std: standard deviation of an episode's first state around the middle.
        batch_size: states of one optimiser step.

    Raises:
        ToyError: a value is not allowed.
    """

    drawn = True

    def __init__(
        self,
        horizon: int = 6,
        temperature: float = 0.1,
        reach: float = 0.25,
        width: float = 0.15,
        cost: float = 0.1,
        grid: int = 61,
        nodes: int = 20,
        start_std: float = 0.05,
        batch_size: int = 128,
    ) -> None:
        super().__init__(batch_size)
        bounded("--data.start_std", start_std, 0.0, 1.0)
        self.problem = MultiGoal(horizon, temperature, reach, width, cost, grid, nodes)
        self.start_std = start_std

    def loader(self, seeds: Sequence[int]) -> DrawnLoader:
        """See :meth:`ToyDataModule.loader`: states (R, steps, B, 2), and integer steps of the episode (R, steps, B)."""
        streams, like = NoiseStream(seeds, "data/multigoal", (self.batch_size, 3), uniform), torch.zeros(1)

        def draw(start: int, stop: int) -> tuple[Tensor, ...]:
            u = torch.stack([streams.at(step, like) for step in range(start, stop)], dim=1)
            return 2 * u[..., :2] - 1, (u[..., 2] * self.problem.horizon).long().clamp(max=self.problem.horizon - 1)

        return DrawnLoader(draw, self.batch_size)
