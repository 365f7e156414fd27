"""A function to learn: a sine whose frequency grows.

lightning-toys fit -c flow_vs_regression/flow --data.target my_target.Chirp --data.target.rate 12
"""

import torch
from torch import Tensor

from lightning_toys.flow_vs_regression import Target


class Chirp(Target):
    """f(c) = sin(rate c^2).

    Args:
        rate: half of the angular frequency at c = 1.
    """

    dim = 1  # outputs

    def __init__(self, rate: float = 10.0) -> None:
        self.rate = rate

    def __call__(self, c: Tensor) -> Tensor:
        """Map c (M, 1), float64, to f(c) (M, 1)."""
        return torch.sin(self.rate * c.square())

    @property
    def highest_frequency(self) -> float:
        """May be left out: with it, too few points are told of."""
        return 2 * self.rate
