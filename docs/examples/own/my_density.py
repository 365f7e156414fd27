"""A target by its density alone, which need not be normalised: a ring of good actions.

lightning-toys fit -c generative_policy/flow --data.target my_density.Ring --data.target.radius 0.5
"""

import torch
from torch import Tensor

from lightning_toys.generative_policy import Target


class Ring(Target):
    """p(a) proportional to exp(-(|a| - radius)^2 / (2 width^2)).

    Args:
        radius: of the ring.
        width: standard deviation across it.
    """

    dim = 2
    bounds = (-1.0, 1.0)  # samples are drawn within
    normalised = False

    def __init__(self, radius: float = 0.6, width: float = 0.05) -> None:
        self.radius, self.width = radius, width

    def log_prob(self, x: Tensor) -> Tensor:
        """Map x (..., 2) to log p(x) (...), up to a constant; torch differentiates it."""
        distance = x.square().sum(-1).clamp_min(1e-12).sqrt()  # a gradient at the centre too
        return -0.5 * torch.square((distance - self.radius) / self.width)
