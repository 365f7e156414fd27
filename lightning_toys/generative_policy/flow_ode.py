"""Flows as ODEs: sampling from noise (t = 1) to data (t = 0), and exact likelihoods (arXiv 1806.07366)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_toys.flows import Solver, integrate

Velocity = Callable[[Tensor, Tensor], Tensor]  # (z (..., D), t (..., 1)) -> dz/dt


def flow_sample(velocity: Velocity, e: Tensor, solver: Solver, nfe: int, tolerance: float = 1e-5) -> Tensor:
    """Integrate dz/dt = velocity(z, t) from z_1 = e down to t = 0 and return z_0, (..., D).

    Args:
        velocity: (z (..., D), t (..., 1)) to dz/dt (..., D).
        e: noise (..., D).
        solver: as in :func:`~lightning_toys.flows.integrate`.
        nfe: evaluations of ``velocity``, likewise; unused by ``dopri5``.
        tolerance: dopri5's, relative and absolute.
    """

    def backwards(q: Tensor, z: Tensor) -> Tensor:
        # dopri5 looks past the end and interpolates back; there is no velocity there
        return -velocity(z, (1 - q).clamp(0.0, 1.0).expand(z[..., :1].shape))

    return integrate(backwards, e, solver, nfe, rtol=tolerance, atol=tolerance)


def flow_log_prob(
    velocity_and_divergence: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, tolerance: float = 1e-5
) -> Tensor:
    """Return log q(x) of the flow's distribution at t = 0, with the exact divergence (Chen et al. 2018).

    log q_0(z_0) = log N(z_1; 0, I) + int_0^1 div v(z_t, t) dt along the trajectory through z_0 = x.

    Args:
        velocity_and_divergence: (z (..., D), t (..., 1)) to dz/dt (..., D) and its divergence (..., 1).
        x: points (..., D).
        tolerance: dopri5's, relative and absolute.

    Returns:
        log q(x) in nats (...).
    """

    D = x.shape[-1]

    def augmented(t: Tensor, state: Tensor) -> Tensor:
        z = state[..., :D]
        return torch.cat(velocity_and_divergence(z, t.clamp(0.0, 1.0).expand(z[..., :1].shape)), dim=-1)

    start = torch.cat([x, torch.zeros_like(x[..., :1])], dim=-1)
    end = integrate(augmented, start, "dopri5", rtol=tolerance, atol=tolerance)
    z = end[..., :D]
    return -0.5 * z.square().sum(-1) - 0.5 * D * math.log(2 * math.pi) + end[..., D]
