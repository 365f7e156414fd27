"""Elementwise steps over all chains in one pass, for ``torch.compile`` (``--model.settings.compile true``).

Their results differ from the uncompiled ones by roundings, which now and then flip a Metropolis-Hastings decision; the
distribution is the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def box_muller(words: Tensor) -> Tensor:
    """Turn random words, int32 (rows, B), into standard normals (rows, B) (Box and Muller 1958).

    The formula is that of :meth:`Noise.draw_normal`.
    """
    scale = 2.0**-24
    first, angle = (words >> 8).float().view(len(words), 2, -1).unbind(1)
    radius = ((first * scale + (0.5 + scale)).log() * -2.0).sqrt()
    angle = angle * (2 * math.pi * scale)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).view(words.shape)


def uniforms_from_words(words: Tensor) -> Tensor:
    """Turn random words, int32 (rows, B), into uniforms (rows, B) in [0, 1)."""
    return (words >> 8).float() * 2.0**-24 + 0.5


def gaussian_mala(x: Tensor, xi: Tensor, u: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Take a MALA step on N(mu, 1 / tau), with the formula of :func:`kernels.langevin_proposal`.

    Args:
        x: states (B,).
        xi: standard normals (B,).
        u: uniforms (B,).
        parameters: mu, tau and sqrt(eta / 2) (3,).

    Returns:
        The new states (B,), and 1 where the proposal was accepted, else 0 (B,).
    """
    mu, tau, half = parameters.unbind()
    grad = (mu - x) * tau
    proposal = x + 2 * half * half * grad + 2 * half * xi
    new_grad = (mu - proposal) * tau
    w = grad + new_grad
    log_ratio = 0.5 * ((proposal - mu) * new_grad - (x - mu) * grad) - half * w * (xi + 0.5 * half * w)
    accepted = (u < log_ratio.exp()).to(x)
    return torch.lerp(x, proposal, accepted), accepted
