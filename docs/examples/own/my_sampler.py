"""A sampler of densities of one's own: the middles of a grid's cells, each replica's shifted by its seed.

lightning-toys fit -c generative_policy/flow --data.target my_density.Ring --data.sampler my_sampler.Grid
"""

import itertools
import math

import numpy as np
import torch

from lightning_toys.generative_policy import Particles, Sampler, Target
from lightning_toys.training.noise import keyed_generator


class Grid(Sampler):
    """Every cell's point, weighed by the density: for a few dimensions, and modes wider than a cell.

    Args:
        cells: along each coordinate.
    """

    def __init__(self, cells: int = 200) -> None:
        self.cells = cells

    def draw(self, target: Target, seed: int, stream: str) -> Particles:
        """Return weighted points of ``target`` within its bounds."""
        shift = keyed_generator(seed, 0, f"grid/{stream}").random(target.dim)  # in cells
        low, high = target.box()
        along = (np.arange(self.cells)[:, None] + shift) / self.cells  # (cells, D)
        unit = torch.from_numpy(np.array(list(itertools.product(*along.T))))
        points = low + (high - low) * unit
        log_p = target.log_prob(points)
        log_weights = log_p - torch.logsumexp(log_p, 0)
        cell = float((high - low).log().sum()) - target.dim * math.log(self.cells)  # a cell's log volume
        log_z = float(torch.logsumexp(log_p, 0)) + cell
        return Particles(points, log_weights, log_z, effective=1 / float(log_weights.exp().square().sum()))
