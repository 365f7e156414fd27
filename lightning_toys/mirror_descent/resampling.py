"""Resampling schemes of particle methods: which particles are kept, given their weights."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_toys.mirror_descent.kernels import Noise


def systematic_resampling(weight: Tensor, uniform: Tensor) -> Tensor:
    """Return the indices (groups, N) that are kept in each group, index i floor or ceil of N weight_i times.

    >>> systematic_resampling(torch.tensor([[0.5, 0.25, 0.0, 0.25]]), torch.tensor([0.5])).tolist()
    [[0, 0, 1, 3]]

    Args:
        weight: (groups, N), each row of sum 1.
        uniform: one for each group, in [0, 1) (groups,).
    """
    n = weight.shape[-1]
    quantiles = (torch.arange(n, dtype=weight.dtype, device=weight.device) + uniform.to(weight)[:, None]) / n
    return torch.searchsorted(weight.cumsum(-1), quantiles).clamp_(max=n - 1)


def inverse_distribution(weight: Tensor, uniform: Tensor) -> Tensor:
    """Return the index of each uniform (groups, N) by the distribution function of weights (groups, N), of any sum."""
    total = weight.cumsum(-1)
    at = uniform.to(weight) * total[:, -1:]
    return torch.searchsorted(total, at, right=True).clamp_(max=weight.shape[-1] - 1)


class Resampling(ABC):
    """Which particles are kept: a base class for schemes of your own, given by class_path.

    Each index i has to be kept N weight_i times on average: estimates of Z are then unbiased.
    """

    def uniforms(self, noise: Noise, groups: int, n: int) -> Tensor:
        """Return the uniforms that :meth:`indices` takes: one a particle (groups, n), or as the scheme wants."""
        return noise.uniform().view(groups, n)

    @abstractmethod
    def indices(self, weight: Tensor, uniform: Tensor) -> Tensor:
        """Return the indices (groups, N) that are kept, given weights (groups, N), each row of sum 1."""


class Systematic(Resampling):
    """One uniform a group, and N quantiles 1 / N apart (Kitagawa 1996)."""

    def uniforms(self, noise: Noise, groups: int, n: int) -> Tensor:
        """See :meth:`Resampling.uniforms`: (groups,)."""
        return noise.uniforms_of_groups(groups // noise.blocks)

    def indices(self, weight: Tensor, uniform: Tensor) -> Tensor:
        """See :meth:`Resampling.indices`."""
        return systematic_resampling(weight, uniform)


class Multinomial(Resampling):
    """N independent draws (Gordon et al. 1993): the counts' variance is N w (1 - w).

    >>> Multinomial().indices(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.7, 0.2]])).tolist()
    [[1, 0]]
    """

    def indices(self, weight: Tensor, uniform: Tensor) -> Tensor:
        """See :meth:`Resampling.indices`."""
        return inverse_distribution(weight, uniform)


class Residual(Resampling):
    """floor(N w_i) copies of each, and independent draws of what is left (Liu and Chen 1998; Douc and Cappe 2005).

    >>> Residual().indices(torch.tensor([[0.5, 0.0, 0.25, 0.25]]), torch.tensor([[0.1, 0.9, 0.4, 0.3]])).tolist()
    [[0, 0, 2, 3]]
    """

    def indices(self, weight: Tensor, uniform: Tensor) -> Tensor:
        """See :meth:`Resampling.indices`."""
        n = weight.shape[-1]
        scaled = weight.double() * n
        copies = (scaled + 1e-9).floor()  # a weight of 2 / n that was rounded down is two copies
        slots = torch.arange(n, dtype=torch.float64, device=weight.device).expand_as(scaled).contiguous()
        fixed = torch.searchsorted(copies.cumsum(-1), slots, right=True).clamp_(max=n - 1)
        drawn = inverse_distribution((scaled - copies).clamp_min(0.0), uniform)
        return torch.where(slots < copies.sum(-1, keepdim=True), fixed, drawn)
