"""Errors of predictions, and how well they keep to the target's geometry (a subspace, a rotation).

Predictions have shape (..., M, D): any leading axes (replicas, draws of x0), M points, D outputs. Every metric keeps
the replica axis (the first) and averages over draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_toys.flow_vs_regression.targets import Piecewise, Projected, Rotation, Target


def pointwise_errors(prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Return ``l1`` (mean absolute error) and ``l2`` (root mean squared error), overall and per output.

    prediction (R, K, M, D), truth (M, D) -> values (R,). With D > 1 there are ``l1_dim0``, ``l2_dim0``, ... too.

    >>> errors = pointwise_errors(torch.tensor([3.0, -1.0]).view(1, 1, 2, 1), torch.zeros(2, 1))
    >>> {name: round(v.item(), 4) for name, v in errors.items()}
    {'l1': 2.0, 'l2': 2.2361}
    """
    error = prediction - truth
    l1, mse = error.abs().mean((1, 2)), error.square().mean((1, 2))
    out = {"l1": l1.mean(-1), "l2": mse.mean(-1).sqrt()}
    if truth.shape[-1] > 1:
        for d in range(truth.shape[-1]):
            out[f"l1_dim{d}"], out[f"l2_dim{d}"] = l1[:, d], mse[:, d].sqrt()
    return out


def principal_axes(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return right singular vectors (..., D, D), as columns, and singular values (..., D) of centred (..., M, D)."""
    centred = points - points[..., :1, :]  # a constant becomes exactly 0, which its rounded mean would not make it
    centred = centred - centred.mean(-2, keepdim=True)
    # the eigenvectors of the D x D scatter matrix are the right singular vectors, and cost no M x M work
    values, vectors = torch.linalg.eigh(centred.transpose(-1, -2) @ centred)
    return vectors.flip(-1), values.flip(-1).clamp_min(0).sqrt()


def subspace_alignment(points: Tensor, basis: Tensor) -> Tensor:
    """Return |V V' - U U'|_F for the top r principal axes V of ``points`` and an orthonormal ``basis`` U (D, r).

    The Frobenius norm is 0 where the spans agree, sqrt(2 r) where they are orthogonal. (..., M, D) -> (...); NaN for
    constant points.
    """
    axes, s = principal_axes(points)
    V = axes[..., : basis.shape[1]]
    distance: Tensor = torch.linalg.matrix_norm(V @ V.transpose(-1, -2) - basis @ basis.T)
    return torch.where(s[..., 0] > 0, distance, torch.nan)


def explained_variance(points: Tensor, rank: int) -> Tensor:
    """Return the fraction of variance along the top ``rank`` principal axes, (..., M, D) -> (...); NaN if constant."""
    _, s = principal_axes(points)
    s2 = s.square()
    fraction: Tensor = s2[..., :rank].sum(-1) / s2.sum(-1)
    return fraction


def off_subspace_ratio(f: Tensor, projector: Tensor) -> Tensor:
    """Return |(I - P) f| / |f|, the sine of the angle from f to the range of P: (..., D) -> (...); NaN where f = 0."""
    residual = f - torch.einsum("...d,...de->...e", f, projector)
    ratio: Tensor = residual.norm(dim=-1) / f.norm(dim=-1)
    return ratio


def interval_matrix(f: Tensor, c: Tensor, target: Piecewise) -> Tensor:
    """Return |(I - P_j) f| / |f|, mean over draws and points of interval i: f (R, K, M, D), c (M, 1) -> (R, i, j)."""
    interval = target.interval(c)
    ratios = torch.stack([off_subspace_ratio(f, p) for p in target.projectors], dim=-1)  # (R, K, M, j)
    rows = [ratios[:, :, interval == i].nanmean((1, 2)) for i in range(target.intervals)]
    return torch.stack(rows, dim=1)


def boundary_profile(f: Tensor, c: Tensor, target: Piecewise) -> Tensor:
    """Return |(I - Q_i) f| / |f| near each interior boundary i, Q_i the projector on span[P_{i-1}, P_i].

    Averaged over draws and points within ``target.boundary_width``; f (R, K, M, D), c (M, 1) -> (R, intervals - 1).
    """
    out = []
    for i, q in enumerate(target.boundary_projectors(), start=1):
        near = (c.double().squeeze(-1) - i / target.intervals).abs() <= target.boundary_width
        out.append(off_subspace_ratio(f[:, :, near], q).nanmean((1, 2)))
    return torch.stack(out, dim=1)


def rotation_profile(f: Tensor, c: Tensor, target: Rotation) -> tuple[Tensor, Tensor]:
    """Return the means over draws and c of |cos(f_k, v_k)| and |(I - v_k v_k') f_k| / |f_k|, each (R, components)."""
    v = target.directions(c)  # (M, k, n)
    parts = f.reshape(*f.shape[:-1], target.components, target.size)
    parallel = (parts * v).sum(-1)
    norm = parts.norm(dim=-1)
    perpendicular = (parts - parallel.unsqueeze(-1) * v).norm(dim=-1)
    return (parallel.abs() / norm).nanmean((1, 2)), (perpendicular / norm).nanmean((1, 2))


def compute_metrics(
    prediction: Tensor, truth: Tensor, c: Tensor, target: Target | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return every metric that is defined for the target: scalars (R,) and arrays (R, ...), by name.

    Args:
        prediction: predictions (R, K, M, D), K draws of x0.
        truth: the target's values (M, D).
        c: where, (M, C).
        target: decides which geometric metrics there are; None where it is not known.
    """
    prediction, truth, c = prediction.double().cpu(), truth.double().cpu(), c.double().cpu()
    scalars, arrays = pointwise_errors(prediction, truth), {}
    if isinstance(target, Projected):
        scalars["subspace_alignment"] = subspace_alignment(prediction, target.basis).mean(1)
        scalars["explained_variance"] = explained_variance(prediction, target.rank).mean(1)
        scalars["off_subspace"] = off_subspace_ratio(prediction, target.projector).nanmean((1, 2))
    elif isinstance(target, Piecewise):
        arrays["interval_matrix"] = interval_matrix(prediction, c, target)
        arrays["boundary_profile"] = boundary_profile(prediction, c, target)
        scalars["off_subspace"] = arrays["interval_matrix"].diagonal(dim1=1, dim2=2).mean(-1)
        scalars["boundary"] = arrays["boundary_profile"].mean(-1)
    elif isinstance(target, Rotation):
        cosine, perpendicular = rotation_profile(prediction, c, target)
        arrays["rotation_cosine"], arrays["rotation_perpendicular"] = cosine, perpendicular
        scalars["cosine"], scalars["cosine_min"] = cosine.mean(-1), cosine.min(-1).values
        scalars["perpendicular"], scalars["perpendicular_max"] = perpendicular.mean(-1), perpendicular.max(-1).values
    return scalars, arrays
