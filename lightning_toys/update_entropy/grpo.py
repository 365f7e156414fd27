"""Dr. GRPO: group-relative policy gradients without biases of length and spread (Liu et al. 2025, arXiv 2503.20783).

B prompts with G responses each; A_bg = r_bg - mean_g r_bg, not divided by a deviation. The loss is

    mean_b [ -sum_{g,k} min(rho_k A, clip(rho_k, 1 - low, 1 + high) A) / (G Lmax_b) ],   rho_k = exp(l_k - l_k^old)

with Lmax_b the longest response of prompt b: every token of a prompt weighs the same, however long its response.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_toys.update_entropy.sequences import Sequences


@dataclass(frozen=True)
class Clipping:
    """Bounds of the ratio rho: within [1 - low, 1 + high] a token moves the loss either way."""

    low: float = 0.2
    high: float = 0.2


def groups(sequences: Sequences) -> dict[int, list[int]]:
    """Return the rows of each prompt, in order of appearance."""
    out: dict[int, list[int]] = {}
    for row, number in enumerate(sequences.prompt):
        out.setdefault(number, []).append(row)
    return out


def advantages(sequences: Sequences) -> Tensor:
    """Return A (N,): each reward less the mean of its group."""
    rewards = torch.tensor(sequences.rewards, dtype=torch.float64)
    out = torch.empty_like(rewards)
    for rows in groups(sequences).values():
        out[rows] = rewards[rows] - rewards[rows].mean()
    return out


def shares(sequences: Sequences) -> Tensor:
    """Return 1 / (B G Lmax_b) of each sequence (N,): what one unit of advantage at one token weighs."""
    found = groups(sequences)
    out = torch.empty(len(sequences), dtype=torch.float64)
    for rows in found.values():
        out[rows] = 1 / (len(found) * len(rows) * max(len(sequences.responses[i]) for i in rows))
    return out


def drop(sequences: Sequences, row: int) -> tuple[Sequences, list[int]]:
    """Return the batch without one sequence, and the rows that are left: group mean, G and Lmax are those of the rest.

    A prompt whose last sequence goes still counts among the B prompts only if it has another.
    """
    left = [i for i in range(len(sequences)) if i != row]
    return sequences.take(left), left


def token_weights(sequences: Sequences, width: int) -> Tensor:
    """Return w (N, width) such that the loss's gradient on policy is -sum w_ik grad l_ik."""
    each = advantages(sequences) * shares(sequences)
    live = torch.arange(width).unsqueeze(0) < torch.tensor(sequences.lengths).unsqueeze(1)
    return each.unsqueeze(1) * live


def loss(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, share: Tensor, clipping: Clipping
) -> tuple[Tensor, Tensor]:
    """Return the loss of some of a batch's sequences, and how many tokens have a ratio outside of its bounds.

    Args:
        logp: l_k with its graph (N, T).
        old: l_k of the policy that drew the sequences (N, T).
        mask: 1 where there is a token (N, T).
        advantage: A (N,), see :func:`advantages`.
        share: of a token in the whole batch (N,), see :func:`shares`.
        clipping: bounds of the ratio.
    """
    A = advantage.to(logp).unsqueeze(1)
    rho = (logp - old).exp()
    within = rho.clamp(1 - clipping.low, 1 + clipping.high)
    gain = torch.minimum(rho * A, within * A) * mask
    outside = ((rho != within) & mask.bool()).sum()
    return -(gain.sum(1) * share.to(logp)).sum(), outside.detach()


def informative(sequences: Sequences, tolerance: float = 1e-8) -> list[int]:
    """Return the prompts of which some response has an advantage above ``tolerance``."""
    A = advantages(sequences)
    return [number for number, rows in groups(sequences).items() if float(A[rows].abs().max()) > tolerance]
