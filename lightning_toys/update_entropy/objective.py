"""All that a policy-gradient step's loss is made of: averages, the advantages' scale, a KL penalty, an entropy bonus.

    -sum_i n_i o_i  +  beta sum_i m_i sum_k [exp(l_k^ref - l_k) - (l_k^ref - l_k) - 1]  -  c / (sum_j T_j) sum_ik H_ik

o_i and n_i are those of :mod:`~lightning_toys.update_entropy.losses`. The penalty is Schulman's k3 estimate of
KL(policy || reference) at each token (http://joschu.net/blog/kl-approx.html), averaged as the loss averages its tokens
(m_i = n_i; n_i / T_i where the objective is that of a whole response); the bonus is the mean entropy of the step's
tokens whatever the loss. Both are as in TRL 1.10 (commit f2cd577, trl/trainer/grpo_trainer.py, ``beta`` and
``entropy_coef``): its dapo and cispo divide the bonus by the step's tokens, as here; its other losses take the mean
over each micro-batch, then over micro-batches, which is the same where there is one. TRL's importance sampling of
vLLM's log-probabilities (``vllm_importance_sampling_correction``) multiplies a token's loss by another ratio; that is
not here, and a step that was taken with it is not the one that is rebuilt. The penalty's gradient is
that of the estimate as it is written, (1 - exp(l^ref - l)) grad l, which is not the gradient of the divergence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_toys.errors import ToyError, bounded, require
from lightning_toys.imports import load_class
from lightning_toys.update_entropy.grpo import ClipRange, Scored
from lightning_toys.update_entropy.losses import (
    BETA,
    LOSS,
    LOSSES,
    DrGRPO,
    PolicyLoss,
    RewardScale,
    ScoredResponses,
    reward_deviation,
    rewards_of,
)


class ResponseWeights(NamedTuple):
    """What the whole step says about some of its responses.

    Attributes:
        advantage: A (N,).
        normalization: n (N,).
        kl: beta m (N,), or None where there is no penalty.
        entropy: c / sum_j T_j, what the entropy of one token weighs.
    """

    advantage: Tensor
    normalization: Tensor
    kl: Tensor | None = None
    entropy: float = 0.0

    def take(self, rows: Any) -> ResponseWeights:
        """Return those of some responses: a list of rows, or a slice."""
        kl = None if self.kl is None else self.kl[rows]
        return ResponseWeights(self.advantage[rows], self.normalization[rows], kl, self.entropy)


@dataclass(frozen=True)
class Objective:
    """A loss with its settings: all that a step's gradient depends on besides the policies.

    Args:
        loss: averages, ratio and baseline.
        name: of the loss, as it was given.
        scale: what advantages are divided by, see :func:`~lightning_toys.update_entropy.losses.reward_deviation`.
        clip_range: of the ratio.
        beta: weight of the KL penalty; 0 for none.
        entropy_coef: weight c of the entropy bonus; 0 for none.
    """

    loss: PolicyLoss = field(default_factory=DrGRPO)
    name: str = "dr_grpo"
    scale: RewardScale = "none"
    clip_range: ClipRange = field(default_factory=ClipRange)
    beta: float = 0.0
    entropy_coef: float = 0.0

    @classmethod
    def from_flags(
        cls,
        name: str,
        arguments: Mapping[str, Any] | None,
        scale: RewardScale,
        clip_range: ClipRange,
        beta: float = 0.0,
        entropy_coef: float = 0.0,
    ) -> Objective:
        """Return the objective that flags ask for.

        Args:
            name: of :data:`~lightning_toys.update_entropy.losses.LOSSES`, or ``module.Class`` of a :class:`PolicyLoss`.
            arguments: of the class.
            scale: see :func:`~lightning_toys.update_entropy.losses.reward_deviation`.
            clip_range: of the ratio.
            beta: weight of the KL penalty.
            entropy_coef: weight of the entropy bonus.

        Raises:
            ToyError: there is no such loss, it does not take the arguments, or a weight is not allowed.
        """
        known = ", ".join(LOSSES)
        if name in LOSSES:
            kind: Any = LOSSES[name]
        else:
            require("." in str(name), f"{LOSS}: {name} is not allowed; give one of {known}, or module.Class")
            try:
                kind = load_class(name)
            except ToyError as error:
                raise ToyError(f"{LOSS}: {error}; give one of {known}, or module.Class") from None
            require(
                isinstance(kind, type) and issubclass(kind, PolicyLoss),
                f"{LOSS}: {name} is no lightning_toys.update_entropy.PolicyLoss; give a subclass of it",
            )
        require(
            scale in ("none", "group", "batch"),
            f"--model.scale_rewards: {scale} is not allowed; give none, group or batch",
        )
        bounded(BETA, beta, 0.0)
        bounded("--model.entropy_coef", entropy_coef, 0.0)
        try:
            loss: PolicyLoss = kind(**(arguments or {}))
        except TypeError as error:
            raise ToyError(f"--model.loss_arguments: {arguments} is not allowed for {name}: {error}") from None
        if beta:
            loss.penalty_weights(ScoredResponses([0], [1], [0.0]))  # refused here where the loss has none
        return cls(loss, name, scale, clip_range, float(beta), float(entropy_coef))

    def describe(self) -> str:
        """Return the loss in words, for the line that says which one is assumed."""
        scaled = {
            "none": "not scaled",
            "group": "divided by the group's deviation",
            "batch": "by the batch's deviation",
        }
        clip = f"ratio clipped to {1 - self.clip_range.low:g} to {1 + self.clip_range.high:g}"
        kl = f"; KL penalty {self.beta:g}" if self.beta else ""
        bonus = f"; entropy bonus {self.entropy_coef:g}" if self.entropy_coef else ""
        return f"{self.name} ({self.loss.meaning}; advantages {scaled[self.scale]}; {clip}{kl}{bonus})"

    def advantages(self, batch: Scored) -> Tensor:
        """Return A (N,) of a step's responses: those that come with them, or reward less baseline, scaled."""
        if given := getattr(batch, "advantages", None):
            return torch.tensor(given, dtype=torch.float64)
        A = rewards_of(batch) - self.loss.baseline(batch)
        return A if self.scale == "none" else A / reward_deviation(batch, self.scale)

    def response_weights(self, batch: Scored) -> ResponseWeights:
        """Return what each response of a whole step weighs in the loss's parts."""
        kl = self.beta * self.loss.penalty_weights(batch) if self.beta else None
        tokens = max(1, sum(batch.lengths))
        return ResponseWeights(self.advantages(batch), self.loss.normalization(batch), kl, self.entropy_coef / tokens)

    def value(
        self, logp: Tensor, old_logp: Tensor, mask: Tensor, advantage: Tensor, normalization: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the part of the policy gradient's loss that some of a step's responses make, and how many tokens were
        clipped.

        Args:
            logp: l_k with its graph (N, T).
            old_logp: l_k of the policy that generated the responses (N, T).
            mask: 1 where there is a token (N, T).
            advantage: A (N,) of the whole step's :meth:`advantages`.
            normalization: n (N,), likewise.
        """
        o, outside = self.loss.objective(logp, old_logp, mask, advantage.to(logp), self.clip_range)
        return -(o * normalization.to(logp)).sum(), outside.sum().detach()

    def token_weights(
        self, batch: Scored, width: int, logp: Tensor | None = None, reference_logp: Tensor | None = None
    ) -> Tensor:
        """Return w (N, width) such that the loss's gradient, its entropy bonus left out, is -sum_ik w_ik grad l_ik.

        Args:
            batch: the responses of a step; of ``batch.old_logp``, where there is one, ratios are taken.
            width: at most the tokens of the longest response.
            logp: l_k of the policy (N, T); None: of the policy that generated the responses, so that ratios are 1.
            reference_logp: l_k of the reference (N, T); None: of the policy itself, where the penalty has no gradient.
        """
        if not batch.lengths:  # the only prompt's responses were left out
            return torch.zeros(0, width, dtype=torch.float64)
        lengths = torch.tensor(batch.lengths).unsqueeze(1)
        whole = max(width, 1, *batch.lengths)
        mask = (torch.arange(whole).unsqueeze(0) < lengths).double()
        start = torch.zeros_like(mask) if logp is None else widened(logp, whole) * mask
        given = getattr(batch, "old_logp", None)
        old = widened(pad_rows(given), whole) if given and logp is not None else start
        weights = self.response_weights(batch)
        with torch.enable_grad():
            at = start.clone().requires_grad_()
            value = self.value(at, old, mask, weights.advantage, weights.normalization)[0]
            if weights.kl is not None and reference_logp is not None:
                value = value + kl_penalty(at, widened(reference_logp, whole), mask, weights.kl)
            (gradient,) = torch.autograd.grad(value, at)
        return -gradient[:, :width]

    def entropy_weights(self, batch: Scored, width: int) -> Tensor | None:
        """Return e (N, width) such that the entropy bonus's gradient is -sum_ik e_ik grad H_ik; None without one."""
        if not self.entropy_coef:
            return None
        if not batch.lengths:
            return torch.zeros(0, width, dtype=torch.float64)
        live = torch.arange(width).unsqueeze(0) < torch.tensor(batch.lengths).view(-1, 1)
        return live.double() * self.response_weights(batch).entropy


def kl_penalty(logp: Tensor, reference_logp: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Return sum_i weights_i sum_k [exp(l_k^ref - l_k) - (l_k^ref - l_k) - 1].

    Args:
        logp: l_k with its graph (N, T).
        reference_logp: l_k of the reference (N, T).
        mask: 1 where there is a token (N, T).
        weights: beta m (N,).

    >>> two, one = torch.tensor([[2.0]]).log(), torch.ones(1, 1)
    >>> round(float(kl_penalty(0 * two, two, one, torch.ones(1))), 4)  # 2 - log 2 - 1
    0.3069
    """
    difference = (reference_logp.to(logp) - logp) * mask
    return ((difference.exp() - difference - 1).sum(1) * weights.to(logp)).sum()


def pad_rows(rows: list[list[float]]) -> Tensor:
    """Return numbers of unequal counts as one tensor (N, T), double precision, 0 after the end of each.

    >>> pad_rows([[1.0], [2.0, 3.0]]).tolist()
    [[1.0, 0.0], [2.0, 3.0]]
    """
    parts = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def widened(x: Tensor, width: int) -> Tensor:
    """Return a tensor (N, T) on the CPU in double precision as (N, width), with zeros on the right or less of it."""
    x = x.detach().double().cpu()[:, :width]
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))
