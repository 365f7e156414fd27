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
class ClipRange:
    """The range [1 - low, 1 + high] that the probability ratio rho is clipped to."""

    low: float = 0.2
    high: float = 0.2


def rows_by_prompt(sequences: Sequences) -> dict[int, list[int]]:
    """Return the rows of each prompt, by its number, in order of appearance."""
    out: dict[int, list[int]] = {}
    for row, number in enumerate(sequences.prompt_index):
        out.setdefault(number, []).append(row)
    return out


def advantages(sequences: Sequences) -> Tensor:
    """Return A (N,): each reward less the mean of its group."""
    rewards = torch.tensor(sequences.rewards, dtype=torch.float64)
    out = torch.empty_like(rewards)
    for rows in rows_by_prompt(sequences).values():
        out[rows] = rewards[rows] - rewards[rows].mean()
    return out


def token_normalization(sequences: Sequences) -> Tensor:
    """Return 1 / (B G Lmax_b) of each sequence (N,): the weight of one of its tokens per unit of advantage."""
    found = rows_by_prompt(sequences)
    out = torch.empty(len(sequences), dtype=torch.float64)
    for rows in found.values():
        out[rows] = 1 / (len(found) * len(rows) * max(len(sequences.responses[i]) for i in rows))
    return out


def leave_one_out(sequences: Sequences, row: int) -> tuple[Sequences, list[int]]:
    """Return the batch without one sequence, and the rows left; a prompt left without any no longer counts in B."""
    left = [i for i in range(len(sequences)) if i != row]
    return sequences.take(left), left


def token_weights(sequences: Sequences, width: int) -> Tensor:
    """Return w (N, width) such that the loss's gradient, on policy, is -sum_ik w_ik grad l_ik."""
    weights = advantages(sequences) * token_normalization(sequences)
    live = torch.arange(width).unsqueeze(0) < torch.tensor(sequences.lengths).unsqueeze(1)
    return weights.unsqueeze(1) * live


def dr_grpo_loss(
    logp: Tensor, old_logp: Tensor, mask: Tensor, advantage: Tensor, normalization: Tensor, clip_range: ClipRange
) -> tuple[Tensor, Tensor]:
    """Return the part of the loss that some of a batch's sequences make, and how many tokens' ratios were clipped.

    Args:
        logp: l_k with its graph (N, T).
        old_logp: l_k of the policy that generated the sequences (N, T).
        mask: 1 where there is a token (N, T).
        advantage: A (N,), see :func:`advantages`.
        normalization: of the whole batch (N,), see :func:`token_normalization`.
        clip_range: of the ratio.
    """
    A = advantage.to(logp).unsqueeze(1)
    rho = (logp - old_logp).exp()
    clipped = rho.clamp(1 - clip_range.low, 1 + clip_range.high)
    objective = torch.minimum(rho * A, clipped * A) * mask
    outside = ((rho != clipped) & mask.bool()).sum()
    return -(objective.sum(1) * normalization.to(logp)).sum(), outside.detach()


def nonzero_advantage_prompts(sequences: Sequences, tolerance: float = 1e-8) -> list[int]:
    """Return the numbers of the prompts of which some response has an advantage of more than ``tolerance``."""
    A = advantages(sequences)
    return [number for number, rows in rows_by_prompt(sequences).items() if float(A[rows].abs().max()) > tolerance]
