"""Losses of policy gradients: what weighs a token, by which ratio, against which baseline.

Each is -sum_i n_i o_i over the responses i of a step, o_i an objective of the response's tokens and n_i a weight that
sums up how the loss averages. With l_k the log-probability of token k, rho_k = exp(l_k - l_k^old), T_i a length:

    dr_grpo    o = sum_k min(rho_k A, clip(rho_k) A)            n = 1 / (B G Lmax_b), or 1 / (N length)
    grpo       the same                                         n = 1 / (N T_i)
    dapo       the same                                         n = 1 / sum_j T_j        (token_mean is another name)
    bnpo       the same                                         n = 1 / (P sum of T_j in the response's micro-batch)
    cispo      o = sum_k sg[min(rho_k, ratio_max)] A l_k        n = 1 / sum_j T_j
    gspo       o = min(s A, clip(s) A), s = exp(mean_k log rho_k)    n = 1 / N
    rloo       o = min(R A, clip(R) A), R = exp(sum_k log rho_k)     n = 1 / N
    reinforce  o = A sum_k l_k                                  n = 1 / N

B prompts, G responses each, N = B G, Lmax_b the longest response of a prompt, P micro-batches, sg: no gradient. A is
the reward less the mean of its group; of the others of its group in rloo; of the whole batch, or 0, in reinforce. Names
are those of TRL 1.10 (commit f2cd577, trl/trainer/grpo_trainer.py and rloo_trainer.py), where dapo with rewards scaled
by the group's deviation is the default; tests/update_entropy/test_losses.py has its formulas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_toys.errors import ToyError, bounded, require
from lightning_toys.update_entropy.grpo import ClipRange, Scored, rows_by_prompt, token_normalization

LOSS, BETA = "--model.loss", "--model.beta"
RewardScale = Literal["none", "group", "batch"]
SCALE_FLOOR = 1e-4  # that is added to a deviation, as TRL does


class ScoredResponses(NamedTuple):
    """The responses of a step on all ranks together, without their tokens; see
    :class:`~lightning_toys.update_entropy.grpo.Scored`."""

    prompt_index: list[int]
    lengths: list[int]
    rewards: list[float]


def rewards_of(batch: Scored) -> Tensor:
    """Return the rewards (N,), double precision."""
    return torch.tensor(batch.rewards, dtype=torch.float64)


def lengths_of(batch: Scored) -> Tensor:
    """Return T_i (N,), double precision."""
    return torch.tensor(batch.lengths, dtype=torch.float64)


def group_means(values: Tensor, batch: Scored) -> Tensor:
    """Return at each response the mean of values (N,) over its group."""
    out = torch.empty_like(values)
    for rows in rows_by_prompt(batch).values():
        out[rows] = values[rows].mean()
    return out


def reward_deviation(batch: Scored, scale: RewardScale) -> Tensor:
    """Return at each response what its advantage is divided by (N,).

    Args:
        batch: the responses.
        scale: ``none`` for 1; the rewards' standard deviation (n - 1 in the denominator) over the ``group`` or the
            ``batch``, plus :data:`SCALE_FLOOR`; 0 where there is one response only.
    """
    rewards = rewards_of(batch)
    if scale == "none":
        return torch.ones_like(rewards)
    out = torch.empty_like(rewards)
    groups = rows_by_prompt(batch).values() if scale == "group" else [list(range(len(rewards)))]
    for rows in groups:
        out[rows] = rewards[rows].std() if len(rows) > 1 else 0.0
    return out + SCALE_FLOOR


def clipped(ratio: Tensor, A: Tensor, clip_range: ClipRange) -> tuple[Tensor, Tensor]:
    """Return min(ratio A, clip(ratio) A), and where the ratio is outside of its range; shapes are broadcast."""
    inside = ratio.clamp(1 - clip_range.low, 1 + clip_range.high)
    return torch.minimum(ratio * A, inside * A), ratio != inside


class PolicyLoss(ABC):
    """A policy gradient's loss; a class of one's own is given as ``--model.loss module.Class``."""

    meaning: ClassVar[str] = "a loss of one's own"  # what is printed beside the name

    def baseline(self, batch: Scored) -> Tensor:
        """Return what is taken off each reward (N,): the mean of the group."""
        return group_means(rewards_of(batch), batch)

    @abstractmethod
    def normalization(self, batch: Scored) -> Tensor:
        """Return n_i of each response of a step (N,), double precision."""

    def penalty_weights(self, batch: Scored) -> Tensor:
        """Return m_i of each response of a step (N,), double precision: what a token of it weighs in a KL penalty.

        A token's penalty is averaged as its objective is; a loss whose objective is that of a whole response says how.
        """
        return self.normalization(batch)

    def objective(
        self, logp: Tensor, old_logp: Tensor, mask: Tensor, A: Tensor, clip_range: ClipRange
    ) -> tuple[Tensor, Tensor]:
        """Return o_i (N,), and 1 at the tokens whose ratio was clipped (N, T).

        Args:
            logp: l_k with its graph (N, T).
            old_logp: l_k of the policy that generated the responses (N, T).
            mask: 1 where there is a token (N, T).
            A: advantages (N,).
            clip_range: of the ratio.
        """
        value, outside = clipped((logp - old_logp).exp(), A.unsqueeze(1), clip_range)
        return (value * mask).sum(1), outside & mask.bool()


class DrGRPO(PolicyLoss):
    """Every token weighs the same, however long its response (Liu et al. 2025, arXiv 2503.20783).

    Args:
        length: that responses are divided by; None for the longest one of the prompt, a number for one for all (TRL
            takes ``max_completion_length``).
    """

    meaning = "tokens summed, divided by the longest response of the prompt or a given length"

    def __init__(self, length: int | None = None) -> None:
        if length is not None:
            bounded("--model.loss_arguments.length", length, 1)
        self.length = length

    def normalization(self, batch: Scored) -> Tensor:
        """See :meth:`PolicyLoss.normalization`."""
        if self.length is None:
            return token_normalization(batch)
        return torch.full((len(batch.rewards),), 1 / (len(batch.rewards) * self.length), dtype=torch.float64)


class GRPO(PolicyLoss):
    """The mean over a response's tokens, then over responses (Shao et al. 2024, arXiv 2402.03300)."""

    meaning = "mean over each response's tokens, then over responses"

    def normalization(self, batch: Scored) -> Tensor:
        """See :meth:`PolicyLoss.normalization`."""
        return 1 / (len(batch.rewards) * lengths_of(batch))


class DAPO(PolicyLoss):
    """The mean over all tokens of the step (Yu et al. 2025, arXiv 2503.14476); ``clip_high`` .28 there."""

    meaning = "mean over all tokens of the step"

    def normalization(self, batch: Scored) -> Tensor:
        """See :meth:`PolicyLoss.normalization`."""
        return torch.full((len(batch.rewards),), 1 / sum(batch.lengths), dtype=torch.float64)


class BNPO(PolicyLoss):
    """The mean over the tokens of a micro-batch, then over micro-batches.

    Args:
        sequences: of a micro-batch, in the order in which they were sampled (TRL shuffles them first); None: all.
    """

    meaning = "mean over the tokens of each micro-batch, then over micro-batches"

    def __init__(self, sequences: int | None = None) -> None:
        if sequences is not None:
            bounded("--model.loss_arguments.sequences", sequences, 1)
        self.sequences = sequences

    def normalization(self, batch: Scored) -> Tensor:
        """See :meth:`PolicyLoss.normalization`."""
        parts = torch.split(lengths_of(batch), self.sequences or len(batch.rewards))
        return torch.cat([torch.full_like(part, 1 / (len(parts) * float(part.sum()))) for part in parts])


class CISPO(DAPO):
    """The ratio's size is clipped, not its gradient: every token keeps one (MiniMax 2025, arXiv 2506.13585).

    Args:
        ratio_max: greatest ratio; 5 in ScaleRL (arXiv 2510.13786) and in TRL's documentation.
    """

    meaning = "log-probabilities weighted by ratios, which have a greatest value and no gradient; mean over all tokens"

    def __init__(self, ratio_max: float = 5.0) -> None:
        bounded("--model.loss_arguments.ratio_max", ratio_max, 0.0, above=True)
        self.ratio_max = ratio_max

    def objective(
        self, logp: Tensor, old_logp: Tensor, mask: Tensor, A: Tensor, clip_range: ClipRange
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`PolicyLoss.objective`; the clip range plays no part."""
        ratio = (logp - old_logp).detach().exp()
        return (ratio.clamp(max=self.ratio_max) * A.unsqueeze(1) * logp * mask).sum(1), (
            (ratio > self.ratio_max) & mask.bool()
        )


class GSPO(PolicyLoss):
    """One ratio a response, the geometric mean of its tokens' (Zheng et al. 2025, arXiv 2507.18071).

    Its ranges are narrow: ``clip_low`` .0003 and ``clip_high`` .0004 there.
    """

    meaning = "one ratio a response, the geometric mean of its tokens'; mean over responses"

    def normalization(self, batch: Scored) -> Tensor:
        """See :meth:`PolicyLoss.normalization`."""
        return torch.full((len(batch.rewards),), 1 / len(batch.rewards), dtype=torch.float64)

    def penalty_weights(self, batch: Scored) -> Tensor:
        """See :meth:`PolicyLoss.penalty_weights`: the mean over a response's tokens."""
        return self.normalization(batch) / lengths_of(batch)

    def log_ratio(self, difference: Tensor, mask: Tensor) -> Tensor:
        """Return a response's log-ratio (N,) of its tokens' (N, T): their mean."""
        return difference.sum(1) / mask.sum(1).clamp(min=1)

    def objective(
        self, logp: Tensor, old_logp: Tensor, mask: Tensor, A: Tensor, clip_range: ClipRange
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`PolicyLoss.objective`."""
        ratio = self.log_ratio((logp - old_logp) * mask, mask).exp()
        value, outside = clipped(ratio, A, clip_range)
        return value, outside.unsqueeze(1) & mask.bool()


class RLOO(GSPO):
    """REINFORCE with the mean of the group's other rewards as baseline (Ahmadian et al. 2024, arXiv 2402.14740).

    The ratio is that of whole responses, as in TRL's RLOOTrainer.
    """

    meaning = "less the mean of the group's other rewards; one ratio a whole response, tokens summed"

    def penalty_weights(self, batch: Scored) -> Tensor:
        """See :meth:`PolicyLoss.penalty_weights`.

        Raises:
            ToyError: always; here a KL penalty is a part of the reward, and has no gradient of its own.
        """
        raise ToyError(
            f"{BETA}: not allowed with rloo, where the KL penalty is a part of the reward; give rewards less it"
        )

    def baseline(self, batch: Scored) -> Tensor:
        """See :meth:`PolicyLoss.baseline`."""
        rewards, ones = rewards_of(batch), torch.ones(len(batch.rewards), dtype=torch.float64)
        for rows in rows_by_prompt(batch).values():
            ones[rows] *= len(rows)
        # of one response alone there are no others: its advantage is 0
        return (group_means(rewards, batch) * ones - rewards) / (ones - 1).clamp(min=1) + rewards * (ones == 1)

    def log_ratio(self, difference: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`GSPO.log_ratio`: their sum."""
        return difference.sum(1)


class Reinforce(GSPO):
    """REINFORCE (Williams 1992): log-probabilities of whole responses, no ratio.

    Args:
        baseline: ``batch`` takes the mean of all rewards off, ``none`` nothing. With ``--model.scale_rewards batch``
            the former is the advantage of REINFORCE++ (Hu 2025, arXiv 2501.03262).
    """

    meaning = "log-probabilities of responses, no ratio, less the batch's mean reward or nothing; mean over responses"

    def __init__(self, baseline: Literal["batch", "none"] = "batch") -> None:
        require(
            baseline in ("batch", "none"),
            f"--model.loss_arguments.baseline: {baseline} is not allowed; give batch or none",
        )
        self.subtracted = baseline

    def penalty_weights(self, batch: Scored) -> Tensor:
        """See :meth:`PolicyLoss.penalty_weights`: the sum over a response's tokens."""
        return self.normalization(batch)

    def baseline(self, batch: Scored) -> Tensor:
        """See :meth:`PolicyLoss.baseline`."""
        rewards = rewards_of(batch)
        return torch.full_like(rewards, float(rewards.mean()) if self.subtracted == "batch" else 0.0)

    def objective(
        self, logp: Tensor, old_logp: Tensor, mask: Tensor, A: Tensor, clip_range: ClipRange
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`PolicyLoss.objective`; the clip range plays no part."""
        return A * (logp * mask).sum(1), torch.zeros_like(mask, dtype=torch.bool)


LOSSES: dict[str, type[PolicyLoss]] = {
    "dr_grpo": DrGRPO,
    "grpo": GRPO,
    "dapo": DAPO,
    "token_mean": DAPO,
    "bnpo": BNPO,
    "cispo": CISPO,
    "gspo": GSPO,
    "rloo": RLOO,
    "reinforce": Reinforce,
}
