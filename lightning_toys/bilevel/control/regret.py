"""The bilevel local regret of a model that is learned while its problem changes (arXiv 2601.15363)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_toys.bilevel.vectors import moving_average_


class LocalRegret(nn.Module):
    """Mean over a run of |mean of the last n outer gradients|^2, each measured on a large batch at its own time.

    The gradients are the agent's own, before they are averaged, clipped or scaled by Adam: with and without
    ``--model.solver.smoothing`` they are of one kind. Agents that descend different losses have regrets of different
    kinds.

    Args:
        replicas: R.
        size: P, the model's parameters.
        window: n.

    >>> regret = LocalRegret(replicas=1, size=2, window=2)
    >>> for g in ([[3.0, 0.0]], [[-3.0, 0.0]], [[0.0, 4.0]]):
    ...     term = regret.add(torch.tensor(g))
    >>> term, regret.mean  # the last mean is (-1.5, 2); the three terms are 9, 0 and 6.25
    (tensor([6.2500]), tensor([5.0833]))
    """

    recent: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, replicas: int, size: int, window: int = 10) -> None:
        super().__init__()
        self.register_buffer("recent", torch.zeros(replicas, window, size))
        self.register_buffer("total", torch.zeros(replicas))
        self.register_buffer("count", torch.zeros(1))

    @torch.no_grad()
    def add(self, gradient: Tensor) -> Tensor:
        """Add a gradient (R, P); return its term (R,): the squared norm of the mean of the last n."""
        term = moving_average_(self.recent, int(self.count), gradient.to(self.recent)).square().sum(1)
        self.total += term
        self.count += 1
        return term

    @property
    def mean(self) -> Tensor:
        """The mean of the terms so far (R,); NaN before the first."""
        found: Tensor = self.total / self.count
        return found


def model_size(parameters: Sequence[Tensor]) -> int:
    """Return P, the number of one replica's parameters, each (R, ...)."""
    return sum(p[0].numel() for p in parameters)
