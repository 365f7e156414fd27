"""The tanh-Gaussian policy of Soft Actor-Critic (Haarnoja et al. 2018, arXiv 1812.05905): a = tanh(mu + sigma xi)."""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Bound = Literal["tanh", "clip"]


def bounded_log_sigma(raw: Tensor, bound: Bound) -> Tensor:
    """Return log sigma, shaped as ``raw``: -1.5 + 3.5 tanh(raw) in (-5, 2), or raw clipped to [-20, 2]."""
    if bound == "tanh":
        return -1.5 + 3.5 * torch.tanh(raw)
    return raw.clamp(-20.0, 2.0)


def log_tanh_derivative(y: Tensor) -> Tensor:
    """Return log(d tanh(y) / dy) = 2 (log 2 - y - softplus(-2 y)), elementwise, which does not underflow."""
    return 2 * (math.log(2) - y - F.softplus(-2 * y))


def squash(mu: Tensor, log_sigma: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
    """Return the action a = tanh(mu + sigma xi) and its log-likelihood, with the change of variables through tanh.

    Args:
        mu: (..., d).
        log_sigma: (..., d).
        xi: standard normals (..., d).

    Returns:
        a (..., d), and log pi(a) (...), in nats.

    Example:
        >>> zero = torch.zeros(1, 2)
        >>> a, log_prob = squash(zero, zero, zero)
        >>> a.tolist(), round(log_prob.item(), 4)
        ([[0.0, 0.0]], -1.8379)
    """
    y = torch.addcmul(mu, log_sigma.exp(), xi)
    log_prob = -0.5 * xi.square() - log_sigma - 0.5 * math.log(2 * math.pi) - log_tanh_derivative(y)
    return torch.tanh(y), log_prob.sum(-1)


def tanh_gaussian_log_prob(a: Tensor, mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Return log pi(a) (...) of given actions a (..., d) in (-1, 1), as in :func:`squash`; -inf at -1 and 1."""
    y = torch.atanh(a)
    xi = (y - mu) * torch.exp(-log_sigma)
    log_prob = -0.5 * xi.square() - log_sigma - 0.5 * math.log(2 * math.pi) - log_tanh_derivative(y)
    return log_prob.sum(-1).masked_fill((a.abs() >= 1).any(-1), -torch.inf)


def gauss_hermite_grid(nodes: int = 32, dim: int = 2) -> tuple[Tensor, Tensor]:
    """Return the tensor Gauss-Hermite rule: xi (nodes^D, D), weights (nodes^D,) with sum_k w_k f(xi_k) = E f(N(0, I)).

    float64; exact for polynomials of degree below 2 ``nodes`` in each coordinate.
    """
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    w = w / w.sum()
    xi = np.stack(np.meshgrid(*[z] * dim, indexing="ij"), -1).reshape(-1, dim)
    return torch.from_numpy(xi), torch.from_numpy(functools.reduce(np.multiply.outer, [w] * dim).reshape(-1))
