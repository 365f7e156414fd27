"""Data for tests of update_entropy: a reward that a policy earns before it has learned anything."""

from __future__ import annotations

from lightning_toys.update_entropy.data import ArithmeticData
from lightning_toys.update_entropy.task import Addition, Problem


class OddLengths(Addition):
    """1 for a response of odd length, and a little for each 7."""

    def reward(self, problem: Problem, response: str) -> float:
        return len(response) % 2 + 0.1 * response.count("7")


class OddData(ArithmeticData):
    """See :class:`OddLengths`."""

    def __init__(self, digits: int = 2, slips: float = 0.2, batch_size: int = 64) -> None:
        super().__init__(digits, slips, batch_size)
        self.task = OddLengths(digits, slips)
