"""The expected reward's change under the same step, beside the entropy's: what a step buys, and what it costs.

J = E r over responses. On evaluation sequences with rewards, a finite step's change is by self-normalised importance
sampling, and its derivative at eta = 0 is

    dJ/d eta = (1 / N) sum_i (r_i - mean r) S_i,   S_i = sum_k dl_ik,

an inner product with one gradient as the entropy's is, so that momentum, decay, every sequence and every token of the
batch have their influence on J as on H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_toys.update_entropy.estimators import (
    MAX_LOG_WEIGHT,
    Estimate,
    ImportanceEstimate,
    Scores,
    effective_sample_size,
    ratio_difference,
)


def known_rewards(rewards: Sequence[float]) -> bool:
    """Whether sequences have rewards, and not all the same.

    >>> known_rewards([1.0, 0.0]), known_rewards([1.0, 1.0]), known_rewards([1.0, float("nan")]), known_rewards([])
    (True, False, False, False)
    """
    return len(rewards) > 1 and all(map(math.isfinite, rewards)) and len(set(rewards)) > 1


def reward_weights(scores: Scores, rewards: Sequence[float]) -> Tensor:
    """Return the weights (N, T) of grad l_ik in the gradient of J."""
    r = torch.tensor(rewards, dtype=torch.float64).to(scores.mask)
    return (r - r.mean()).unsqueeze(1) * scores.mask / len(r)


def reward_derivative(scores: Scores, dlogp: Tensor, rewards: Sequence[float]) -> Estimate:
    """Return dJ/d eta along a direction, with its error by the delta method.

    Args:
        scores: of the sequences at the policy that generated them.
        dlogp: derivative of l_k along the direction (N, T).
        rewards: of the sequences (N,).
    """
    r = torch.tensor(rewards, dtype=torch.float64).to(scores.mask)
    s = (dlogp * scores.mask).sum(1)
    terms = (r - r.mean()) * s / len(r)
    value = terms.sum()
    influence = ((r - r.mean()) * (s - s.mean()) - value) / len(r)
    return Estimate.from_influence(value, terms, influence, scores.prompt_index)


def reward_change(
    base: Scores, moved: Scores, rewards: Sequence[float], limit: float = MAX_LOG_WEIGHT
) -> ImportanceEstimate:
    """Return J(eta) - J(0) by self-normalised importance sampling; ``entropy`` of the result is J(eta).

    Args:
        base: at the policy that generated the sequences.
        moved: of the same sequences at the policy in question.
        rewards: of the sequences (N,).
        limit: log-weights are clipped to this on either side.
    """
    r = torch.tensor(rewards, dtype=torch.float64).to(base.mask)
    log_w = ((moved.logp - base.logp) * base.mask).sum(1)
    w = log_w.clamp(-limit, limit).exp()
    change = ratio_difference(w * r, w, r, torch.ones_like(r), base.prompt_index)
    clipped = float((log_w.abs() > limit).double().mean())
    return ImportanceEstimate(change, float((w * r).sum() / w.sum()), effective_sample_size(w), clipped)


@dataclass
class RewardResult:
    """What is estimated of J on one evaluation batch, in units of reward, and per unit of eta.

    Attributes:
        mean: J itself, with its error.
        slopes: dJ/d eta along ``full``, ``momentum``, ``decay``, ``grad``: value and standard error.
        tokens: influence of each update token on J (N_U, T), a term of dJ/d eta.
        changes: by step size, the measured change along the whole step.
    """

    mean: Estimate
    slopes: dict[str, tuple[float, float]]
    tokens: Tensor
    changes: dict[float, ImportanceEstimate] = field(default_factory=dict)
