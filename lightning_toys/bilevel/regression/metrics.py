"""Metrics of a run over the stream, each with one value a replica."""

from __future__ import annotations

import torch
from torch import Tensor


def rolling_mean(values: Tensor, n: int) -> Tensor:
    """Return the mean of the last n values at each time (T, ...), of fewer at the start; values (T, ...).

    >>> rolling_mean(torch.tensor([1.0, 3.0, 5.0]), 2)
    tensor([1., 2., 4.])
    """
    total = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
    t = torch.arange(1, len(values) + 1)
    first = (t - n).clamp(min=0)
    shape = (-1, *[1] * (values.dim() - 1))
    return (total[t] - total[first]) / (t - first).view(shape)


def mean_of_last_sixth(values: Tensor) -> Tensor:
    """Return the mean (...) of the last sixth of values (T, ...), of one at least."""
    return values[-max(1, len(values) // 6) :].mean(0)


def local_regret(gradients: Tensor, n: int) -> Tensor:
    """Return the terms (T, R) of the bilevel local regret: |mean of the last n gradients at t|^2 (arXiv 2601.15363).

    Args:
        gradients: dF_t / dw (T, R, W) in the normalised weights w = lambda / L, which is L dF_t / dlambda as F does not
            depend on lambda's scale. One normalisation for all: in lambda's own scale a run would do well by growing L.
        n: gradients that are averaged.
    """
    return rolling_mean(gradients, n).square().sum(-1)


def normalised(lam: Tensor) -> Tensor:
    """Return lambda (..., W) divided by its sum; 0 where that is 0."""
    total = lam.sum(-1, keepdim=True)
    return torch.where(total > 0, lam / torch.where(total > 0, total, torch.ones_like(total)), torch.zeros_like(lam))


def largest_lags(lam: Tensor, count: int) -> Tensor:
    """Return the lags of the largest weights (R, W), largest first: (R, count); NaN where all weights are equal.

    >>> largest_lags(torch.tensor([[0.1, 0.7, 0.2]]), 2)
    tensor([[2., 3.]], dtype=torch.float64)
    """
    order = lam.argsort(dim=1, descending=True, stable=True)[:, :count]
    lags = torch.nn.functional.pad((order + 1).double(), (0, count - order.shape[1]), value=torch.nan)
    equal = lam.amax(1) == lam.amin(1)
    return torch.where(equal[:, None], torch.nan, lags)


def effective_lags(lam: Tensor) -> Tensor:
    """Return over how many lags the weights lambda (R, W) are spread: 1 / sum w^2 of w = lambda / L (R,).

    1 where one lag has all, W where all are equal; infinite without weights.

    >>> effective_lags(torch.tensor([[2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([1., 4.])
    """
    return 1 / normalised(lam).square().sum(-1)
