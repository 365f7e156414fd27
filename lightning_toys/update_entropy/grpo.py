"""Dr. GRPO: group-relative policy gradients without biases of length and spread (Liu et al. 2025, arXiv 2503.20783).

B prompts with G responses each; A_bg = r_bg - mean_g r_bg, not divided by a deviation. The loss is

    mean_b [ -sum_{g,k} min(rho_k A, clip(rho_k, 1 - low, 1 + high) A) / (G Lmax_b) ],   rho_k = exp(l_k - l_k^old)

with Lmax_b the longest response of prompt b: every token of a prompt weighs the same, however long its response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_toys.update_entropy.sequences import Sequences


@dataclass(frozen=True)
class ClipRange:
    """The range [1 - low, 1 + high] that the probability ratio rho is clipped to."""

    low: float = 0.2
    high: float = 0.2


class Scored(Protocol):
    """Responses as far as a loss's averages go: :class:`~lightning_toys.update_entropy.sequences.Sequences`, say.

    Attributes:
        prompt_index: number of each response's prompt: those of one number are one group.
        lengths: tokens of each response.
        rewards: of each response.
    """

    @property
    def prompt_index(self) -> list[int]: ...  # noqa: D102
    @property
    def lengths(self) -> list[int]: ...  # noqa: D102
    @property
    def rewards(self) -> list[float]: ...  # noqa: D102


def rows_by_prompt(sequences: Scored) -> dict[int, list[int]]:
    """Return the rows of each prompt, by its number, in order of appearance."""
    out: dict[int, list[int]] = {}
    for row, number in enumerate(sequences.prompt_index):
        out.setdefault(number, []).append(row)
    return out


def advantages(sequences: Scored) -> Tensor:
    """Return A (N,): each reward less the mean of its group."""
    rewards = torch.tensor(sequences.rewards, dtype=torch.float64)
    out = torch.empty_like(rewards)
    for rows in rows_by_prompt(sequences).values():
        out[rows] = rewards[rows] - rewards[rows].mean()
    return out


def token_normalization(sequences: Scored) -> Tensor:
    """Return 1 / (B G Lmax_b) of each sequence (N,): the weight of one of its tokens per unit of advantage."""
    found = rows_by_prompt(sequences)
    out = torch.empty(len(sequences.lengths), dtype=torch.float64)
    for rows in found.values():
        out[rows] = 1 / (len(found) * len(rows) * max(sequences.lengths[i] for i in rows))
    return out


def leave_one_out(sequences: Sequences, row: int) -> tuple[Sequences, list[int]]:
    """Return the batch without one sequence, and the rows left; a prompt left without any no longer counts in B."""
    left = [i for i in range(len(sequences)) if i != row]
    return sequences.take(left), left


def nonzero_advantage_prompts(sequences: Scored, tolerance: float = 1e-8) -> list[int]:
    """Return the numbers of the prompts of which some response has an advantage of more than ``tolerance``."""
    A = advantages(sequences)
    return [number for number, rows in rows_by_prompt(sequences).items() if float(A[rows].abs().max()) > tolerance]
