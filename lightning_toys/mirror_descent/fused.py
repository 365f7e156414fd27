"""Elementwise work in one pass over the chains, by ``torch.compile``: for ``--model.settings.compile true``.

The numbers differ from the uncompiled ones by roundings, which flip a decision of Metropolis and Hastings now and then;
the law is the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normals_of(words: Tensor) -> Tensor:
    """Turn raw words, int32 (rows, B), into standard normals, as :meth:`Noise.draw_normal` does."""
    grain = 2.0**-24
    first, angle = (words >> 8).float().view(len(words), 2, -1).unbind(1)
    radius = ((first * grain + (0.5 + grain)).log() * -2.0).sqrt()
    angle = angle * (2 * math.pi * grain)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).view(words.shape)


def uniforms_of(words: Tensor) -> Tensor:
    """Turn raw words, int32 (rows, B), into uniforms in [0, 1)."""
    return (words >> 8).float() * 2.0**-24 + 0.5


def gaussian_mala(x: Tensor, xi: Tensor, u: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Take a MALA step on N(mu, 1 / tau), as :func:`kernels.langevin_proposal` does, and return what came of it.

    Args:
        x: chains (B,).
        xi: standard normals (B,).
        u: uniforms (B,).
        numbers: mu, tau and sqrt(eta / 2).

    Returns:
        the chains, and 1 where the proposal was taken.
    """
    mu, tau, half = numbers.unbind()
    here = (mu - x) * tau
    proposal = x + 2 * half * half * here + 2 * half * xi
    there = (mu - proposal) * tau
    w = here + there
    log_ratio = 0.5 * ((proposal - mu) * there - (x - mu) * here) - half * w * (xi + 0.5 * half * w)
    accepted = (u < log_ratio.exp()).to(x)
    return torch.lerp(x, proposal, accepted), accepted
