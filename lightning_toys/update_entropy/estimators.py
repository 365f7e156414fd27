"""Entropy of a policy, and its change, estimated from sequences that the policy itself generated.

Arrays are (N, T): sequence, position of the response; ``mask`` is 1 where there is a token. l_k is the log-probability
of the sampled token, H_k the entropy of the distribution it was sampled from, S_i = sum_k H_k, T_i the length. All
entropies are in nats.

Entropy per token is E S / E T (``token``) or per sequence E S (``sequence``), both with H_k in the place of -l_k, which
has the same mean and less variance (Rao and Blackwell); ``surprisal`` takes -l_k itself, per token.

All are ratios of sums over sequences, R = sum_i a_i / sum_i b_i, and their standard errors are by the delta method: the
influence of sequence i on R is (a_i - R b_i) / sum b, and sequences of one prompt are one cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_toys.stats import t_quantile

EntropyKind = Literal["token", "sequence", "surprisal"]
MAX_LOG_WEIGHT = 10.0  # log-weights are clipped to this on either side


@dataclass(frozen=True)
class Scores:
    """A policy's log-probabilities and entropies of sequences, token by token, in double precision.

    Attributes:
        logp: l_k (N, T), 0 where the mask is 0.
        entropy: H_k (N, T), likewise.
        mask: 1 where there is a token (N, T).
        prompt_index: number of each sequence's prompt (N,); sequences of one prompt are one cluster.
    """

    logp: Tensor
    entropy: Tensor
    mask: Tensor
    prompt_index: Tensor

    @property
    def lengths(self) -> Tensor:
        """T_i (N,)."""
        return self.mask.sum(1)


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, and each sequence's part in both.

    Attributes:
        value: the estimate.
        se: its standard error, clustered by prompt; NaN with fewer than two prompts.
        prompts: number of clusters.
        contributions: (N,), which sum to the value.
        influence: each sequence's influence on the estimate (N,), of sum 0; their clustered variance is that of the
            estimate (delta method).
    """

    value: float
    se: float
    prompts: int
    contributions: Tensor
    influence: Tensor

    @classmethod
    def from_influence(cls, value: Tensor, contributions: Tensor, influence: Tensor, prompt_index: Tensor) -> Estimate:
        """Return the estimate with the clustered standard error of its influence (N,)."""
        se, prompts = clustered_standard_error(influence, prompt_index)
        return cls(float(value), se, prompts, contributions, influence)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval, by Student's t with one degree of freedom less than there are prompts."""
        return float(self.se * t_quantile(0.975, self.prompts - 1)) if self.prompts > 1 else float("nan")


@dataclass(frozen=True)
class ImportanceEstimate:
    """An entropy change by importance sampling.

    Attributes:
        change: H(eta) - H(0).
        entropy: H(eta).
        ess: effective sample size of the sequences' weights, (sum w)^2 / sum w^2.
        clipped_fraction: fraction of log-weights that were clipped.
    """

    change: Estimate
    entropy: float
    ess: float
    clipped_fraction: float


def clustered_standard_error(influence: Tensor, prompt_index: Tensor) -> tuple[float, int]:
    """Return sqrt(G / (G - 1) sum_g m_g^2), m_g the sum of ``influence`` (N,) over prompt g of G, and G.

    >>> clustered_standard_error(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0, 0, 1]))
    (6.0, 2)
    """
    errors, g = clustered_standard_errors(influence.unsqueeze(1), prompt_index)
    return float(errors), g


def clustered_standard_errors(influence: Tensor, prompt_index: Tensor) -> tuple[Tensor, int]:
    """Return :func:`clustered_standard_error` of every column of ``influence`` (N, D): (D,), NaN for one prompt."""
    _, index = torch.unique(prompt_index, return_inverse=True)
    g = int(index.max()) + 1
    sums = torch.zeros(g, influence.shape[1], dtype=influence.dtype, device=influence.device)
    sums = sums.index_add_(0, index, influence)
    return (sums.square().sum(0) * (g / (g - 1) if g > 1 else float("nan"))).sqrt(), g


def ratio_interval(a: Estimate, b: Estimate, prompt_index: Tensor) -> tuple[float, float] | None:
    """Return the 95 % interval of |A / B| (Fieller 1954) of two estimates of the same draws.

    All r with (a - r b)^2 <= t^2 Var(a - r b) belong to it. Where b does not differ significantly from 0 it has no
    upper end; where a does not, its lower end is 0.

    Args:
        a: of A.
        b: of B.
        prompt_index: of the sequences that both are of (N,).

    Returns:
        Lower and upper end, the latter perhaps infinite; None with fewer than two prompts.
    """
    columns = torch.stack([a.influence, b.influence, a.influence + b.influence], 1)
    errors, prompts = clustered_standard_errors(columns, prompt_index)
    if prompts < 2:
        return None
    t2 = float(t_quantile(0.975, prompts - 1)) ** 2
    v_a, v_b, v_sum = errors.square().tolist()
    # p r^2 - 2 q r + s <= 0
    p, q, s = (b.value**2 - t2 * v_b, a.value * b.value - t2 * (v_sum - v_a - v_b) / 2, a.value**2 - t2 * v_a)
    root = max(0.0, q * q - p * s) ** 0.5
    if p > 0:
        ends = sorted(abs((q + sign * root) / p) for sign in (-1, 1))
        return (0.0 if s <= 0 else ends[0]), ends[1]
    # outside of the roots, which s > 0 puts on either side of 0; their smaller size is s / (|q| + root)
    return (0.0 if s <= 0 else s / (abs(q) + root)), float("inf")


def ratio_terms(scores: Scores, kind: EntropyKind) -> tuple[Tensor, Tensor]:
    """Return the terms of an entropy's numerator at each position (N, T), and of its denominator by sequence (N,)."""
    numerator = -scores.logp if kind == "surprisal" else scores.entropy
    denominator = torch.ones_like(scores.lengths) if kind == "sequence" else scores.lengths
    return numerator * scores.mask, denominator


def ratio_estimate(a: Tensor, b: Tensor, prompt_index: Tensor) -> Estimate:
    """Return sum a / sum b, a and b (N,)."""
    value = a.sum() / b.sum()
    influence = (a - value * b) / b.sum()
    return Estimate.from_influence(value, a / b.sum(), influence, prompt_index)


def entropy(scores: Scores, kind: EntropyKind = "token") -> Estimate:
    """Return the policy's entropy in nats, of sequences that it generated."""
    numerator, denominator = ratio_terms(scores, kind)
    return ratio_estimate(numerator.sum(1), denominator, scores.prompt_index)


def ratio_difference(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, prompt_index: Tensor) -> Estimate:
    """Return sum a / sum b - sum a0 / sum b0 of the same sequences, each (N,)."""
    new, old = ratio_estimate(a, b, prompt_index), ratio_estimate(a0, b0, prompt_index)
    value = a.sum() / b.sum() - a0.sum() / b0.sum()
    contributions, influence = new.contributions - old.contributions, new.influence - old.influence
    return Estimate.from_influence(value, contributions, influence, prompt_index)


def sequence_importance_sampling(
    base: Scores, moved: Scores, kind: EntropyKind = "token", limit: float = MAX_LOG_WEIGHT
) -> ImportanceEstimate:
    """Return the entropy change by self-normalised importance sampling (SNIS), w_i = exp(sum_k l_k' - l_k).

    Args:
        base: at the policy that generated the sequences.
        moved: of the same sequences at the policy in question.
        kind: which entropy.
        limit: log-weights are clipped to this on either side.
    """
    log_w = ((moved.logp - base.logp) * base.mask).sum(1)
    w = log_w.clamp(-limit, limit).exp()
    numerator, denominator = ratio_terms(moved, kind)
    base_numerator, base_denominator = ratio_terms(base, kind)
    change = ratio_difference(
        w * numerator.sum(1), w * denominator, base_numerator.sum(1), base_denominator, base.prompt_index
    )
    h = float((w * numerator.sum(1)).sum() / (w * denominator).sum())
    return ImportanceEstimate(change, h, effective_sample_size(w), float((log_w.abs() > limit).double().mean()))


def prefix_importance_sampling(
    base: Scores, moved: Scores, kind: EntropyKind = "token", limit: float = MAX_LOG_WEIGHT
) -> ImportanceEstimate:
    """Return the entropy change with each position weighted by its prefix alone, c_k = exp(sum_{j<k} l_j' - l_j).

    H_k depends on the tokens before k only, so the tokens from k on need no weight: less variance than whole sequences.
    The surprisal depends on token k too, and takes c_{k+1}. Arguments as :func:`sequence_importance_sampling`.
    """
    d = (moved.logp - base.logp) * base.mask
    log_c = d.cumsum(1) - d
    live = base.mask.bool()
    c = log_c.clamp(-limit, limit).exp() * base.mask
    weight = (log_c + d).clamp(-limit, limit).exp() * base.mask if kind == "surprisal" else c
    numerator, _ = ratio_terms(moved, kind)
    base_numerator, base_denominator = ratio_terms(base, kind)
    # per sequence, the probabilities of what is weighted sum to 1 as they are
    denominator = torch.ones_like(base_denominator) if kind == "sequence" else c.sum(1)
    change = ratio_difference(
        (weight * numerator).sum(1), denominator, base_numerator.sum(1), base_denominator, base.prompt_index
    )
    h = float((weight * numerator).sum() / denominator.sum())
    ess = effective_sample_size(d.sum(1).clamp(-limit, limit).exp())
    return ImportanceEstimate(change, h, ess, float((log_c.abs() > limit)[live].double().mean()))


def effective_sample_size(weights: Tensor) -> float:
    """Return (sum w)^2 / sum w^2.

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 2.0, 0.0]))
    2.6666667461395264
    """
    return float(weights.sum().square() / weights.square().sum())


def leave_one_out_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return at each masked position (N, T) the mean of ``values`` over the other sequences there; 0 if none is."""
    n = mask.sum(0, keepdim=True)
    rest = (values * mask).sum(0, keepdim=True) - values * mask
    return rest / (n - 1).clamp(min=1) * mask


def returns_to_go(scores: Scores, kind: EntropyKind) -> tuple[Tensor, Tensor]:
    """Return the sum of the entropies, and the number of positions, that the choice of token k affects, (N, T) each.

    The entropy at k itself does not depend on token k; its surprisal does.
    """
    numerator, _ = ratio_terms(scores, kind)
    later = numerator.flip(1).cumsum(1).flip(1)
    if kind != "surprisal":
        later = later - numerator
    count = scores.mask.flip(1).cumsum(1).flip(1) - scores.mask
    return later, torch.zeros_like(count) if kind == "sequence" else count


def first_order_weights(scores: Scores, kind: EntropyKind = "token", baseline: bool = True) -> tuple[Tensor, Tensor]:
    """Return the weights of dH_k and of dl_k (N, T) in the entropy's derivative, before division by sum_i b_i.

        dH/d eta = (1 / sum b) sum_i sum_k [dH_k + (A_k - beta_k) dl_k],   A_k = sum_{k' > k} (H_k' - H)

    with beta_k the mean of A_k over the other sequences: what does not depend on token k adds nothing but noise, since
    dl_k has mean 0 given its prefix. Exact in expectation, H and 1 / sum b being ratios of sums.

    Args:
        scores: at the policy that generated the sequences.
        kind: which entropy.
        baseline: whether beta_k is subtracted.
    """
    later, count = returns_to_go(scores, kind)
    h = entropy(scores, kind).value
    A = (later - h * count) * scores.mask
    if baseline:
        A = (A - leave_one_out_mean(A, scores.mask)) * scores.mask
    weight = torch.zeros_like(A) if kind == "surprisal" else scores.mask
    # E dl_k = 0: the surprisal's own derivative -dl_k needs no weight either
    return weight, A


def entropy_surrogate(
    logp: Tensor, entropies: Tensor, scores: Scores, kind: EntropyKind = "token", baseline: bool = True
) -> Tensor:
    """Return a scalar whose gradient is an estimate of the entropy's gradient.

    Args:
        logp: l_k with its graph (N, T).
        entropies: H_k with its graph (N, T).
        scores: the same numbers without.
        kind: which entropy.
        baseline: see :func:`first_order_weights`.
    """
    entropy_weights, logp_weights = first_order_weights(scores, kind, baseline)
    _, denominator = ratio_terms(scores, kind)
    return ((entropy_weights * entropies).sum() + (logp_weights * logp).sum()) / denominator.sum()


def entropy_derivative(
    scores: Scores, dlogp: Tensor, dentropy: Tensor, kind: EntropyKind = "token", baseline: bool = True
) -> Estimate:
    """Return the derivative of the entropy along a direction, in nats per unit of it.

    Args:
        scores: at the policy that generated the sequences.
        dlogp: derivative of l_k along the direction (N, T).
        dentropy: derivative of H_k (N, T).
        kind: which entropy.
        baseline: see :func:`first_order_weights`.
    """
    entropy_weights, logp_weights = first_order_weights(scores, kind, baseline)
    terms = (entropy_weights * dentropy + logp_weights * dlogp).sum(1)
    numerator, denominator = ratio_terms(scores, kind)
    b = denominator.sum()
    value = terms.sum() / b
    # H inside of A is estimated from the same sequences
    denominator_derivative = (denominator_weights(scores, kind, baseline) * dlogp).sum()
    h = numerator.sum() / b
    influence = (terms - value * denominator - denominator_derivative * (numerator.sum(1) - h * denominator)) / b
    return Estimate.from_influence(value, terms / b, influence, scores.prompt_index)


def entropy_second_derivative(
    scores: Scores, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], kind: EntropyKind = "token"
) -> Estimate:
    """Return the second derivative of the entropy along a direction: of :func:`prefix_importance_sampling` at eta = 0.

    Args:
        scores: at the policy that generated the sequences.
        first: first derivatives of l_k and H_k along the direction (N, T).
        second: their second derivatives (N, T).
        kind: which entropy.
    """
    (dl, dh), (d2l, d2h) = first, second
    dl, d2l = dl * scores.mask, d2l * scores.mask
    before1, before2 = dl.cumsum(1) - dl, d2l.cumsum(1) - d2l
    if kind == "surprisal":
        value, dvalue, d2value = -scores.logp, -dl, -d2l
        at1, at2 = before1 + dl, before2 + d2l
    else:
        value, dvalue, d2value = scores.entropy, dh, d2h
        at1, at2 = before1, before2
    mask = scores.mask
    n0 = (value * mask).sum(1)
    n1 = ((dvalue + value * at1) * mask).sum(1)
    n2 = ((d2value + 2 * dvalue * at1 + value * (at1.square() + at2)) * mask).sum(1)
    if kind == "sequence":
        b0 = torch.ones_like(n0)
        b1 = b2 = torch.zeros_like(n0)
    else:
        b0, b1, b2 = mask.sum(1), (before1 * mask).sum(1), ((before1.square() + before2) * mask).sum(1)
    B = b0.sum()
    R = n0.sum() / B
    R1 = (n1.sum() - R * b1.sum()) / B
    terms = n2 - R * b2 - 2 * R1 * b1
    R2 = terms.sum() / B
    # the delta method through R and R', which stand in the terms
    influence0 = (n0 - R * b0) / B
    influence1 = (n1 - R * b1 - b1.sum() * influence0 - R1 * b0) / B
    influence = (terms - R2 * b0 - b2.sum() * influence0 - 2 * b1.sum() * influence1) / B
    return Estimate.from_influence(R2, terms / B, influence, scores.prompt_index)


def entropy_derivatives(
    scores: Scores, contributions: Tensor, denominator_derivatives: Tensor, kind: EntropyKind = "token"
) -> tuple[Tensor, Tensor]:
    """Return derivatives of the entropy along D directions at once and their standard errors, (D,) each.

    Args:
        scores: at the policy that generated the sequences.
        contributions: of each sequence to each derivative (N, D).
        denominator_derivatives: derivative along each direction (D,) of the log-probabilities weighted by
            :func:`denominator_weights`.
        kind: which entropy.
    """
    influence = derivative_influences(scores, contributions, denominator_derivatives, kind)
    return contributions.sum(0), clustered_standard_errors(influence, scores.prompt_index)[0]


def derivative_influences(
    scores: Scores, contributions: Tensor, denominator_derivatives: Tensor, kind: EntropyKind = "token"
) -> Tensor:
    """Return each sequence's influence on each derivative (N, D); arguments as :func:`entropy_derivatives`."""
    numerator, denominator = ratio_terms(scores, kind)
    b = denominator.sum()
    h = numerator.sum() / b
    influence = contributions - torch.outer(denominator, contributions.sum(0)) / b
    return influence - torch.outer(numerator.sum(1) - h * denominator, denominator_derivatives) / b


def denominator_weights(scores: Scores, kind: EntropyKind = "token", baseline: bool = True) -> Tensor:
    """Return the weights (N, T) of dl_k in the derivative of log sum_i b_i: those that multiply H in A_k."""
    _, count = returns_to_go(scores, kind)
    if baseline:
        count = (count - leave_one_out_mean(count, scores.mask)) * scores.mask
    return count / ratio_terms(scores, kind)[1].sum()
