"""Triangular roots of one small covariance, or of one a chain, as rows of numbers or tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_toys.mirror_descent.affine import Array


def clamped_cholesky(H: Tensor, weight: float, scale: float) -> Tensor:
    """Return the Cholesky factor of scale (I + weight H) for H (D, D, ...), of H's shape.

    Negative pivots, which come of errors in a learned H, are taken for 0.
    """
    C, n = scale * weight * H, len(H)
    zero = torch.zeros_like(C[0, 0])
    L = [[zero] * n for _ in range(n)]
    for j in range(n):
        pivot = scale + C[j, j]
        for k in range(j):
            pivot = pivot - L[j][k].square()
        pivot = pivot.clamp_min(0.0)
        L[j][j] = pivot.sqrt()
        for i in range(j + 1, n):
            above = C[i, j]
            for k in range(j):
                above = above - L[i][k] * L[j][k]
            L[i][j] = torch.where(pivot > 0, above / L[j][j], zero)
    return torch.stack([torch.stack(row) for row in L])


def lower_times(root: Array | Tensor, v: Tensor) -> Tensor:
    """Return L v for a lower triangular L, (D, D) numbers or (D, D, ...), and v (D, ...)."""
    rows = []
    for i in range(len(v)):
        total = root[i, 0] * v[0]
        for j in range(1, i + 1):
            total = total + root[i, j] * v[j]
        rows.append(total)
    return torch.stack(rows)


def lower_transposed_times(root: Array | Tensor, v: Tensor) -> Tensor:
    """Return L' v for a lower triangular L, (D, D) numbers or (D, D, ...), and v (D, ...)."""
    rows = []
    for i in range(len(v)):
        total = root[i, i] * v[i]
        for j in range(i + 1, len(v)):
            total = total + root[j, i] * v[j]
        rows.append(total)
    return torch.stack(rows)
