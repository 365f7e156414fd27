"""The data module of an agent: sizes of its replay buffer and of its batches."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_toys.errors import bounded, require
from lightning_toys.training.data import ToyDataModule
from lightning_toys.training.loader import DrawnLoader, draw_nothing


class ReplayData(ToyDataModule):
    """Settings of the replay buffer, which the agent fills as it acts; a step of the Trainer is one of the environment.

    Args:
        batch_size: transitions of one update.
        init_steps: environment steps with random actions before the first update.
        capacity: transitions kept; the oldest are overwritten.

    Raises:
        ToyError: a size is not allowed, or does not fit the others.
    """

    drawn = True

    def __init__(self, batch_size: int = 256, init_steps: int = 1000, capacity: int = 200_000) -> None:
        super().__init__(batch_size)
        bounded("--data.init_steps", init_steps, 1)
        bounded("--data.capacity", capacity, 1)
        require(
            batch_size <= init_steps,
            f"--data.batch_size: {batch_size} is not allowed; give at most --data.init_steps ({init_steps})",
        )
        require(
            capacity >= init_steps,
            f"--data.capacity: {capacity} is not allowed; give at least --data.init_steps ({init_steps})",
        )
        self.init_steps, self.capacity = init_steps, capacity

    def loader(self, seeds: Sequence[int]) -> DrawnLoader:
        """See :meth:`ToyDataModule.loader`: only step numbers are loaded, the module keeps the transitions."""
        return DrawnLoader(draw_nothing, self.batch_size)
