"""States of the contextual bandit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_toys.errors import bounded, check_settings, require
from lightning_toys.generative_policy.bandit import MODE_HEIGHTS, RotatingModes, turns_to_states
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import DrawnLoader
from lightning_toys.training.noise import NoiseStream, uniform


class BanditData(ToyDataModule):
    """Fresh uniform states on a circle at every step, for :class:`RotatingModes`.

    Args:
        width: width of the reward's modes.
        heights: their heights, three numbers; [1, 1, 1] makes them equally good.
        reward_noise: standard deviation of the noise on an observed reward.
        batch_size: states of one optimiser step.

    Raises:
        ToyError: a value is not allowed.
    """

    drawn = True

    def __init__(
        self,
        width: float = 0.15,
        reward_noise: float = 0.1,
        batch_size: int = 64,
        heights: Sequence[float] = MODE_HEIGHTS,
    ) -> None:
        check_settings(BanditData, locals(), "--data.")
        super().__init__(batch_size)
        require(0 < width < 1, f"--data.width: {width} is not allowed; give a number between 0 and 1")
        bounded("--data.reward_noise", reward_noise, 0.0)
        given = [float(h) for h in heights]
        require(len(given) == 3, f"--data.heights: {given} is not allowed; give three numbers")
        for h in given:
            bounded("--data.heights", h, 0.0, 1e6, above=True)
        self.bandit, self.reward_noise = RotatingModes(width, given), reward_noise

    def loader(self, seeds: Sequence[int]) -> DrawnLoader:
        """See :meth:`ToyDataModule.loader`."""
        turns, like = NoiseStream(seeds, "data/turns", (self.batch_size,), uniform), torch.zeros(1)

        def draw(start: int, stop: int) -> tuple[Tensor, ...]:
            drawn = torch.stack([turns.at(step, like) for step in range(start, stop)], dim=1)
            return (turns_to_states(drawn),)

        return DrawnLoader(draw, self.batch_size)
