"""Points of one's own in flow_vs_regression: noisy ones at random places, which each replica draws for itself.

lightning-toys fit -c flow_vs_regression/flow --data my_data.Noisy --data.noise 0.2
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_toys.flow_vs_regression import PointData, Points
from lightning_toys.training.noise import keyed_generator


class Noisy(PointData):
    """y = sin(2 pi c) + noise at uniform c in [0, 1], judged by the curve without noise.

    Args:
        num_train: points of each replica.
        noise: standard deviation.
        batch_size: rows of a step.
    """

    condition_dim, output_dim = 1, 1

    def __init__(self, num_train: int = 40, noise: float = 0.1, batch_size: int = 20) -> None:
        super().__init__(batch_size=batch_size)
        self.num_train, self.noise = num_train, noise

    def curve(self, c: Tensor) -> Tensor:
        """Return the truth (..., 1) at c (..., 1)."""
        return torch.sin(2 * torch.pi * c)

    def points(self, seeds: Sequence[int]) -> Points:
        """Return the points of the replicas with these seeds, float64; none is held out."""
        drawn = []
        for seed in seeds:
            g = keyed_generator(seed, 0, "noisy/points")  # of (seed, index, use): no other draw is like it
            drawn.append(np.stack([g.random(self.num_train), self.noise * g.standard_normal(self.num_train)]))
        c, noise = torch.from_numpy(np.stack(drawn, 1))[..., None]
        none = c[:, :0]
        return Points(c, self.curve(c) + noise, none, none)

    def evaluation_points(self, max_points: int | None = None) -> tuple[Tensor, Tensor]:
        """Return where predictions are judged, (M, 1), and the truth there, (M, 1)."""
        c = torch.linspace(0, 1, max_points or 200, dtype=torch.float64)[:, None]
        return c, self.curve(c)

    def baseline_rows(self, seeds: Sequence[int], c_eval: Tensor) -> list[dict[str, Tensor]]:
        """Return what a straight line through each replica's points predicts: (1, 1, M, 1), a dict a replica."""
        rows = []
        for c, x in zip(*self.points(seeds)[:2], strict=True):
            slope, level = np.polyfit(c[:, 0].numpy(), x[:, 0].numpy(), 1)
            rows.append({"straight_line": (slope * c_eval + level)[None, None]})
        return rows
