"""Metrics of samples against the target: mode weights, distances, entropies. Samples are (n, D), float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch import Tensor

from lightning_toys.generative_policy.mixture import Mixture, Target
from lightning_toys.training.noise import keyed_generator

Array = NDArray[np.float64]
MODE_RADIUS = 10.0  # standard deviations within which a sample counts for its mode's bias and standard deviation
CHUNK = 1024  # rows of a distance matrix held at once


def mode_metrics(x: Tensor, target: Target) -> dict[str, float]:
    """Return mode weights, their total variation to the target's, and the shares of samples off every mode.

    Each sample x (n, D) is assigned to its nearest mode. ``weight_mode0``, ... are the modes' shares of the samples
    (at most 8 modes), ``tv`` is half the sum of |weight - target's weight|, and ``off3``, ``off5``, ``off10`` are the
    shares further than 3, 5, 10 standard deviations from their mode. For a mixture with one component per mode there
    are ``bias_mode0`` (of the mean, in standard deviations) and ``std_mode0`` (ratio to the standard deviation) of the
    samples within 10 standard deviations too.
    """
    mode, distance = target.nearest(x)
    m = len(target.mode_weights)
    weights = torch.bincount(mode, minlength=m).double() / len(x)
    out = {"tv": float((weights - target.mode_weights).abs().sum() / 2)}
    out |= {f"off{k}": float((distance > k).double().mean()) for k in (3, 5, 10)}
    for i in range(m) if m <= 8 else ():
        out[f"weight_mode{i}"] = float(weights[i])
        members = x[(mode == i) & (distance <= MODE_RADIUS)]
        if isinstance(target, Mixture) and len(target.means) == m and len(members) > 1:
            std = target.stds[i]
            out[f"bias_mode{i}"] = float((members.mean(0) - target.means[i]).norm() / std)
            out[f"std_mode{i}"] = float(members.var(0).mean().sqrt() / std)
    return out


def mean_pairwise_distance(x: Tensor) -> float:
    """Return the mean |x_i - x_j| over i != j of x (n, D).

    >>> mean_pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64))
    5.0
    """
    n = len(x)
    total = sum(float(torch.cdist(rows, x).sum()) for rows in torch.split(x, CHUNK))
    return total / (n * (n - 1))


def energy_distance(x: Tensor, target: Target, target_samples: Tensor) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013), an unbiased estimate that may be below 0.

    Args:
        x: samples (n, D).
        target: for a mixture the terms with Y are exact.
        target_samples: (m, D); over these otherwise.
    """
    if isinstance(target, Mixture):
        cross, own = float(target.mean_distance(x.numpy()).mean()), target.mean_self_distance()
    else:
        rows = torch.split(x, CHUNK)
        cross = sum(float(torch.cdist(a, target_samples).sum()) for a in rows) / (len(x) * len(target_samples))
        own = mean_pairwise_distance(target_samples)
    return 2 * cross - mean_pairwise_distance(x) - own


def sliced_w2(x: Tensor, target_samples: Tensor, directions: int = 64) -> float:
    """Return the sliced 2-Wasserstein distance: the RMS over directions of the projections' 2-Wasserstein distance.

    Args:
        x: samples (n, D).
        target_samples: as many samples of the target.
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
    return float(np.sqrt(np.square(a - b).mean()))


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


def compute_metrics(x: Tensor, target: Target, target_samples: Tensor, pairs: int, neighbours: int) -> dict[str, float]:
    """Return every metric of samples x (n, D).

    Args:
        x: samples (n, D).
        target: the distribution that they should follow.
        target_samples: n samples of it.
        pairs: number of samples for the energy distance, whose cost is quadratic.
        neighbours: k of the entropy estimate.

    All are NaN where a sample is not finite: distances and modes of it would look like numbers.
    """
    if not bool(x.isfinite().all()):
        return dict.fromkeys(compute_metrics(target_samples, target, target_samples, pairs, neighbours), math.nan)
    out = mode_metrics(x, target)
    out["energy_distance"] = energy_distance(x[:pairs], target, target_samples[:pairs])
    out["sliced_w2"] = sliced_w2(x, target_samples)
    out["entropy_knn"] = knn_entropy(x.numpy(), neighbours)
    return out
