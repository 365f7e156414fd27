"""Multilayer perceptrons for R replicas of K heads each, with a derivative along their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_toys.nets import keyed_uniform

Weights = Mapping[str, Tensor]


class HeadMLP(nn.Module):
    """K perceptrons with ReLU for each of R replicas; x (R, B, in) to (R, K, B, out).

    Weights are ``w0`` (R, K, in, h), ``b0`` (R, K, 1, h), ``w1`` ... Replica r depends on its own seed alone.

    Args:
        seeds: one seed a replica.
        name: of the draws; other names are other initial weights.
        sizes: widths, input and output included.
        heads: K.
    """

    def __init__(self, seeds: Sequence[int], name: str, sizes: Sequence[int], heads: int = 1) -> None:
        super().__init__()
        self.heads, self.layers = heads, len(sizes) - 1
        for i, (n, m) in enumerate(pairwise(sizes)):
            # torch.nn.Linear's initial weights, U(-1/sqrt(fan_in), 1/sqrt(fan_in))
            for letter, shape in (("w", (heads, n, m)), ("b", (heads, 1, m))):
                self.register_parameter(f"{letter}{i}", keyed_uniform(seeds, f"{name}.{letter}{i}", shape, n**-0.5))

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters by name, in their order."""
        found: dict[str, Any] = self._parameters
        return dict(found)

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """Map inputs (R, B, in) to (R, K, B, out).

        Args:
            x: the same for all heads.
            weights: in the place of the own.
        """
        p: Weights = weights if weights is not None else self.weights()
        h = x if self.heads == 1 else x.unsqueeze(1).expand(-1, self.heads, -1, -1).flatten(0, 1)
        for i in range(self.layers):
            h = torch.baddbmm(p[f"b{i}"].flatten(0, 1), h, p[f"w{i}"].flatten(0, 1))
            if i < self.layers - 1:
                h = torch.relu(h)
        return h.view(x.shape[0], self.heads, *h.shape[1:])

    @torch.no_grad()
    def along(self, x: Tensor, direction: Weights, weights: Weights | None = None) -> Tensor:
        """Return the derivative (R, K, B, out) of the output along a direction of the weights: J v.

        Args:
            x: inputs (R, B, in).
            direction: v, by the weights' names.
            weights: in the place of the own.
        """
        p: Weights = weights if weights is not None else self.weights()
        h = x if self.heads == 1 else x.unsqueeze(1).expand(-1, self.heads, -1, -1).flatten(0, 1)
        dh: Tensor | None = None
        for i in range(self.layers):
            w, b = p[f"w{i}"].flatten(0, 1), p[f"b{i}"].flatten(0, 1)
            push = torch.baddbmm(direction[f"b{i}"].flatten(0, 1), h, direction[f"w{i}"].flatten(0, 1))
            if dh is not None:
                push = torch.baddbmm(push, dh, w)
            if i == self.layers - 1:
                return push.view(x.shape[0], self.heads, *push.shape[1:])
            h = torch.relu(torch.baddbmm(b, h, w))
            dh = push * (h > 0)
        raise AssertionError("a perceptron has at least one layer")
