"""Variables as vectors: dictionaries of tensors with a leading replica axis R."""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def flatten(v: Tensors) -> Tensor:
    """Return the entries of every tensor (R, ...) side by side: (R, P).

    >>> v = {"w": torch.tensor([[[1.0, 2.0]]]), "b": torch.tensor([[3.0]])}
    >>> flatten(v)
    tensor([[1., 2., 3.]])
    >>> unflatten(flatten(v), v)["w"]
    tensor([[[1., 2.]]])
    """
    return torch.cat([x.flatten(1) for x in v.values()], dim=1)


def unflatten(flat: Tensor, like: Tensors) -> Tensors:
    """Undo :func:`flatten`: split ``flat`` (R, P) into tensors (R, ...) with the names and shapes of ``like``."""
    parts = torch.split(flat, [x[0].numel() for x in like.values()], dim=1)
    return {k: part.reshape(x.shape) for (k, x), part in zip(like.items(), parts, strict=True)}


def inner_product(a: Tensors, b: Tensors) -> Tensor:
    """Return the inner product of a and b, tensors (R, ...) of the same names, in each replica (R,)."""
    return torch.stack([(x * b[k]).flatten(1).sum(1) for k, x in a.items()]).sum(0)


def moving_average_(buffer: Tensor, count: int, v: Tensor) -> Tensor:
    """Put v (R, P), the ``count``-th from 0, into a ring buffer (R, n, P); return the mean of the last n (R, P).

    The smoothed hypergradients of arXiv 2601.15363. Of the first n - 1 vectors, the mean is over those there are.

    Args:
        buffer: changed in place; zeros before the first vector.
        count: vectors put in before this one.
        v: the new one.
    """
    buffer[:, count % buffer.shape[1]] = v
    return buffer.sum(1) / min(count + 1, buffer.shape[1])  # those not there yet are zero


def zeros_like(v: Tensors) -> Tensors:
    """Return a vector of zeros with the shapes of v."""
    return {k: torch.zeros_like(x) for k, x in v.items()}
