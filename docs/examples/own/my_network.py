"""A network: sines in the place of other activations (SIREN, Sitzmann et al. 2020).

lightning-toys fit -c flow_vs_regression/regression --model.network my_network.Siren --model.network.omega 10
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_toys.flow_vs_regression import Architecture
from lightning_toys.nets import ConditionalNet, keyed_uniform


class Siren(Architecture):
    """sin(omega (W [x, c, t] + b)), then such layers, then a linear one.

    Args:
        hidden: width.
        layers: hidden layers.
        omega: frequency of the first layer.
    """

    def __init__(self, hidden: int = 64, layers: int = 2, omega: float = 10.0) -> None:
        self.hidden, self.layers, self.omega = hidden, layers, omega

    def build(
        self, seeds: Sequence[int], x_dim: int, c_dim: int, with_time: bool, out_dim: int | None = None
    ) -> ConditionalNet:
        """Return the network of one replica a seed."""
        sizes = [x_dim + c_dim + with_time, *[self.hidden] * self.layers, out_dim or x_dim]
        return SirenNet(seeds, sizes, self.omega)


class SirenNet(ConditionalNet):
    """Each weight is (R, in, out), one matrix a replica, drawn by the replica's own seed."""

    def __init__(self, seeds: Sequence[int], sizes: Sequence[int], omega: float) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (n, m) in enumerate(itertools.pairwise(sizes)):
            bound = omega / n if i == 0 else math.sqrt(6 / n)
            self.weights.append(keyed_uniform(seeds, f"siren.{i}.weight", (n, m), bound))
            self.biases.append(keyed_uniform(seeds, f"siren.{i}.bias", (1, m), math.pi if i == 0 else bound))

    def forward(self, x: Tensor, c: Tensor, t: Tensor | None = None) -> Tensor:
        """Map x (R, B, D), c (R, B, C) and t (R, B, 1) to (R, B, D)."""
        h = torch.cat([x, c] if t is None else [x, c, t], dim=-1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h, weight)
            if i < len(self.weights) - 1:
                h = torch.sin(h)
        return h
