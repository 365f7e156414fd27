"""Metrics of samples against the target: mode weights, distances, entropies. Samples are (n, D), float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch import Tensor

from lightning_toys.generative_policy.gaussian import log_tanh_derivative
from lightning_toys.generative_policy.target import Target
from lightning_toys.training.noise import keyed_generator

Array = NDArray[np.float64]
MODE_RADIUS = 10.0  # standard deviations within which a sample counts for its mode's bias and standard deviation
CHUNK = 1024  # rows of a distance matrix held at once


def mode_metrics(x: Tensor, target: Target) -> dict[str, float]:
    """Return mode weights, their total variation to the target's, and the shares of samples off every mode.

    Nothing of a target whose modes are not named. Each sample x (n, D) is assigned to its nearest mode.
    ``weight_mode0``, ... are the modes' shares of the samples (at most 8 modes), ``tv`` is half the sum of
    |weight - target's weight|, and ``off3``, ``off5``, ``off10`` are the shares further than 3, 5, 10 standard
    deviations from their mode. Where each mode is a Gaussian there are ``bias_mode0`` (of the mean, in
    standard deviations) and ``std_mode0`` (ratio to the standard deviation) of the samples within 10 of them too.
    """
    if not target.has_modes:
        return {}
    mode, distance = target.nearest(x)
    m, shapes = len(target.mode_weights), target.mode_shapes()
    weights = torch.bincount(mode, minlength=m).double() / len(x)
    out = {"tv": float((weights - target.mode_weights).abs().sum() / 2)}
    out |= {f"off{k}": float((distance > k).double().mean()) for k in (3, 5, 10)}
    for i in range(m) if m <= 8 else ():
        out[f"weight_mode{i}"] = float(weights[i])
        members = x[(mode == i) & (distance <= MODE_RADIUS)]
        if shapes is not None and len(members) > 1:
            std = shapes[1][i]
            out[f"bias_mode{i}"] = float((members.mean(0) - shapes[0][i]).norm() / std)
            out[f"std_mode{i}"] = float(members.var(0).mean().sqrt() / std)
    return out


def mean_pairwise_distance(x: Tensor, pooled: bool = False) -> float:
    """Return the mean |x_i - x_j| over i != j of x (n, D).

    Args:
        x: the points.
        pooled: whether they are drawn with replacement from particles of a distribution without atoms. Then pairs of
            one particle are left out, from the count too: they say nothing of two independent samples, and their zeros
            would take E|X - X'| / N off the mean, N particles being effective.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
        >>> mean_pairwise_distance(x[:2]), round(mean_pairwise_distance(x), 4), mean_pairwise_distance(x, pooled=True)
        (5.0, 3.3333, 5.0)
    """
    n = len(x)
    rows = torch.split(x, CHUNK)
    total = sum(float(torch.cdist(a, x).sum()) for a in rows)
    pairs = n * (n - 1)
    if pooled:
        counts = torch.unique(x, dim=0, return_counts=True)[1]
        pairs = n * n - int(counts.square().sum())
    return total / pairs if pairs else 0.0


def energy_distance(x: Tensor, target: Target, target_samples: Tensor, pooled: bool = False) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013), an unbiased estimate that may be below 0.

    Args:
        x: samples (n, D).
        target: of a mixture, and of others that say so, the terms with Y are exact.
        target_samples: (m, D); over these otherwise. Of a target without samples of its own they are drawn from a pool
            of particles, see :func:`mean_pairwise_distance`; the particles' own error remains, the same for every x.
        pooled: whether x are drawn from such a pool too.
    """
    if target.has_distances:
        cross, own = float(target.mean_distance(x.numpy()).mean()), target.mean_self_distance()
    else:
        rows = torch.split(x, CHUNK)
        cross = sum(float(torch.cdist(a, target_samples).sum()) for a in rows) / (len(x) * len(target_samples))
        own = mean_pairwise_distance(target_samples, not target.has_samples)
    return 2 * cross - mean_pairwise_distance(x, pooled) - own


def sliced_w2(x: Tensor, target_samples: Tensor, directions: int = 64) -> float:
    """Return the sliced 2-Wasserstein distance: the RMS over directions of the projections' 2-Wasserstein distance.

    Args:
        x: samples (n, D).
        target_samples: samples of the target (m, D).
        directions: number of directions: evenly spaced in the plane, one is all there is on a line; from three
            dimensions on they are independent and uniform, always the same.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
        >>> round(sliced_w2(x, x + 1.0), 6)  # a shift d: |d| / sqrt 2
        1.0
    """
    onto = projections(x.shape[1], directions)
    # numpy sorts contiguous rows twenty times faster than torch sorts columns
    a, b = (np.sort(onto @ y.numpy().T, axis=1) for y in (x, target_samples))
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return float(np.sqrt(np.square(a - b).mean()))
    # both quantile functions are constant between the levels i / n and j / m
    levels = np.unique(np.concatenate([np.arange(n + 1) / n, np.arange(m + 1) / m]))
    middle, width = (levels[1:] + levels[:-1]) / 2, np.diff(levels)
    gap = a[:, (middle * n).astype(int)] - b[:, (middle * m).astype(int)]
    return float(np.sqrt((np.square(gap) @ width).mean()))


def projections(dim: int, directions: int) -> Array:
    """Return unit vectors (directions, dim) for :func:`sliced_w2`; one on a line."""
    if dim == 1:
        return np.ones((1, 1))
    if dim == 2:
        angle = np.arange(directions) * (math.pi / directions)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)
    drawn = keyed_generator(0, 0, "metrics/directions").standard_normal((directions, dim))
    onto: Array = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return onto


def knn_entropy(x: Array, k: int = 5) -> float:
    """Return the Kozachenko-Leonenko estimate of the entropy of x (n, D), in nats, from k-th neighbour distances r_k.

    psi(n) - psi(k) + log V_D + D mean log r_k, V_D the volume of the unit ball (Kozachenko and Leonenko 1987).
    """
    distance = cKDTree(x).query(x, k + 1)[0][:, -1]
    n = len(x)
    # equal samples have the distance 0: a distribution with an atom, entropy -inf, written as what float64 resolves
    logs = np.log(np.maximum(distance, np.finfo(np.float64).tiny))
    D = x.shape[1]
    ball = 0.5 * D * math.log(math.pi) - math.lgamma(D / 2 + 1)
    return float(digamma(n) - digamma(k) + ball + D * logs.mean())


def squashed_knn_entropy(y: Array, k: int = 1) -> float:
    """Return :func:`knn_entropy` of tanh(y), y (n, D), estimated before tanh: H(y) + E sum_i log tanh'(y_i), in nats.

    Actions that fill [-1, 1]^D have edges, beyond which a neighbour's ball reaches: their own estimate is too high, of
    400 uniform ones in the plane by .07 with k = 5. y has no edges. What is left is the curvature of the density within
    a ball, which is least with k = 1; the price is more variance (psi'(k)), which a mean over states pays for.

    Example:
        >>> a = keyed_generator(0, 0, "doc").uniform(-1, 1, (4000, 2))
        >>> bool(abs(squashed_knn_entropy(np.arctanh(a)) - math.log(4)) < 0.05)
        True
    """
    return knn_entropy(y, k) + float(log_tanh_derivative(torch.from_numpy(y)).sum(1).mean())


def likelihood_metrics(target: Target, truth: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """Return, of a policy with the density q, what its likelihood of the target's samples says, (R,).

    ``kl_forward``, E log p - E log q, where log p is known, and ``nll``, -E log q, where it is not.

    Args:
        target: the distribution p.
        truth: samples of it (R, m, D).
        log_q: the policy's log-density there (R, m), in nats.
    """
    cross = log_q.double().mean(1).to(truth)
    if target.has_density and target.normalised:
        return {"kl_forward": target.log_prob(truth).mean(1) - cross}
    return {"nll": -cross}


def compute_metrics(
    x: Tensor, target: Target, target_samples: Tensor, pairs: int, neighbours: int, pooled: bool = False
) -> dict[str, float]:
    """Return every metric of samples x (n, D).

    Args:
        x: samples (n, D).
        target: the distribution that they should follow.
        target_samples: samples of it (m, D).
        pairs: number of samples for the energy distance, whose cost is quadratic.
        neighbours: k of the entropy estimate.
        pooled: whether x are drawn with replacement from particles of the target.

    All are NaN where a sample is not finite: distances and modes of it would look like numbers.
    """
    if not bool(x.isfinite().all()):
        return dict.fromkeys(compute_metrics(target_samples, target, target_samples, pairs, neighbours), math.nan)
    out = mode_metrics(x, target)
    out["energy_distance"] = energy_distance(x[:pairs], target, target_samples[:pairs], pooled)
    out["sliced_w2"] = sliced_w2(x, target_samples)
    out["entropy_knn"] = knn_entropy(x.numpy(), neighbours)
    return out
