"""Entropy of a policy, and its change, from sequences that the policy itself drew.

Arrays are (N, T): sequence, position of the response; ``mask`` is 1 where a token was drawn. l_k is the log-probability
of the drawn token, H_k the entropy of the law it was drawn from, S_i = sum_k H_k, T_i the length.

Entropy per token is E S / E T (``token``) or per sequence E S (``sequence``), both with H_k in the place of -l_k, which
has the same mean and less variance (Rao and Blackwell); ``surprisal`` takes -l_k itself, per token.

All are ratios of sums over sequences, R = sum_i a_i / sum_i b_i, and their standard errors are by the delta method:
sequence i moves R by (a_i - R b_i) / sum b, sequences of a prompt count together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import t as student
from torch import Tensor

Kind = Literal["token", "sequence", "surprisal"]
MAX_LOG_WEIGHT = 10.0  # log-weights are clipped to this on either side


@dataclass(frozen=True)
class Scores:
    """What a pass over drawn sequences gives; double precision.

    Attributes:
        logp: l_k (N, T), 0 where the mask is 0.
        entropy: H_k (N, T), likewise.
        mask: 1 where a token was drawn (N, T).
        prompt: number of the sequence's prompt (N,); sequences of one prompt are one cluster.
    """

    logp: Tensor
    entropy: Tensor
    mask: Tensor
    prompt: Tensor

    @property
    def lengths(self) -> Tensor:
        """T_i (N,)."""
        return self.mask.sum(1)


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, and what each sequence gives to it.

    Attributes:
        value: the estimate.
        se: its standard error, clustered by prompt; NaN with fewer than two prompts.
        prompts: number of clusters.
        rows: contributions (N,), which sum to the value.
        moves: by how much each sequence moves the estimate (N,), of sum 0: what the error is made of.
    """

    value: float
    se: float
    prompts: int
    rows: Tensor
    moves: Tensor

    @classmethod
    def of(cls, value: Tensor, rows: Tensor, moves: Tensor, prompt: Tensor) -> Estimate:
        """Return the estimate with the standard error of its moves, those of a prompt being one draw."""
        se, prompts = clustered(moves, prompt)
        return cls(float(value), se, prompts, rows, moves)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval, by Student's t with a degree of freedom less than there are prompts."""
        return float(self.se * student.ppf(0.975, self.prompts - 1)) if self.prompts > 1 else float("nan")


@dataclass(frozen=True)
class Weighted:
    """An entropy change by importance sampling.

    Attributes:
        change: H(eta) - H(0).
        entropy: H(eta).
        ess: effective sample size of the sequences' weights, (sum w)^2 / sum w^2.
        clipped: share of log-weights that were clipped.
    """

    change: Estimate
    entropy: float
    ess: float
    clipped: float


def clustered(moves: Tensor, prompt: Tensor) -> tuple[float, int]:
    """Return the standard error of a sum of ``moves`` (N,), sqrt(G/(G-1) sum_g m_g^2), and the number G of prompts."""
    errors, g = clustered_columns(moves.unsqueeze(1), prompt)
    return float(errors), g


def clustered_columns(moves: Tensor, prompt: Tensor) -> tuple[Tensor, int]:
    """Return :func:`clustered` of every column of ``moves`` (N, D): (D,), NaN for one prompt."""
    _, index = torch.unique(prompt, return_inverse=True)
    g = int(index.max()) + 1
    sums = torch.zeros(g, moves.shape[1], dtype=moves.dtype, device=moves.device).index_add_(0, index, moves)
    return (sums.square().sum(0) * (g / (g - 1) if g > 1 else float("nan"))).sqrt(), g


def terms(scores: Scores, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return what is summed at each position (N, T) and the denominator's share of each sequence (N,)."""
    what = -scores.logp if kind == "surprisal" else scores.entropy
    share = torch.ones_like(scores.lengths) if kind == "sequence" else scores.lengths
    return what * scores.mask, share


def ratio(a: Tensor, b: Tensor, prompt: Tensor) -> Estimate:
    """Return sum a / sum b, a and b (N,)."""
    value = a.sum() / b.sum()
    moves = (a - value * b) / b.sum()
    return Estimate.of(value, a / b.sum(), moves, prompt)


def entropy(scores: Scores, kind: Kind = "token") -> Estimate:
    """Return the policy's entropy in nats."""
    what, share = terms(scores, kind)
    return ratio(what.sum(1), share, scores.prompt)


def difference(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, prompt: Tensor) -> Estimate:
    """Return sum a / sum b - sum a0 / sum b0 of the same sequences."""
    new, old = ratio(a, b, prompt), ratio(a0, b0, prompt)
    value = a.sum() / b.sum() - a0.sum() / b0.sum()
    return Estimate.of(value, new.rows - old.rows, new.moves - old.moves, prompt)


def sequence_weighted(base: Scores, moved: Scores, kind: Kind = "token", limit: float = MAX_LOG_WEIGHT) -> Weighted:
    """Return the change by self-normalised importance sampling, w_i = exp(sum_k l_k' - l_k).

    Args:
        base: at the policy that drew the sequences.
        moved: at the policy in question.
        kind: which entropy.
        limit: log-weights are clipped to this on either side.
    """
    log_w = ((moved.logp - base.logp) * base.mask).sum(1)
    w = log_w.clamp(-limit, limit).exp()
    what, share = terms(moved, kind)
    before, share0 = terms(base, kind)
    change = difference(w * what.sum(1), w * share, before.sum(1), share0, base.prompt)
    h = float((w * what.sum(1)).sum() / (w * share).sum())
    return Weighted(change, h, effective(w), float((log_w.abs() > limit).double().mean()))


def prefix_weighted(base: Scores, moved: Scores, kind: Kind = "token", limit: float = MAX_LOG_WEIGHT) -> Weighted:
    """Return the change with each position weighted by its prefix alone, c_k = exp(sum_{j<k} l_j' - l_j).

    H_k depends on the tokens before k only, so the tokens from k on need no weight: less variance than whole sequences.
    The surprisal depends on token k too, and takes c_{k+1}. Arguments as :func:`sequence_weighted`.
    """
    d = (moved.logp - base.logp) * base.mask
    log_c = d.cumsum(1) - d
    live = base.mask.bool()
    c = log_c.clamp(-limit, limit).exp() * base.mask
    weight = (log_c + d).clamp(-limit, limit).exp() * base.mask if kind == "surprisal" else c
    what, _ = terms(moved, kind)
    before, share0 = terms(base, kind)
    # per sequence, the probabilities of what is weighted sum to 1 as they are
    share = torch.ones_like(share0) if kind == "sequence" else c.sum(1)
    change = difference((weight * what).sum(1), share, before.sum(1), share0, base.prompt)
    h = float((weight * what).sum() / share.sum())
    return Weighted(
        change, h, effective(d.sum(1).clamp(-limit, limit).exp()), float((log_c.abs() > limit)[live].double().mean())
    )


def effective(weights: Tensor) -> float:
    """Return (sum w)^2 / sum w^2."""
    return float(weights.sum().square() / weights.square().sum())


def others_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return at each live position the mean of ``values`` over the other sequences live there; 0 if none is."""
    n = mask.sum(0, keepdim=True)
    rest = (values * mask).sum(0, keepdim=True) - values * mask
    return rest / (n - 1).clamp(min=1) * mask


def returns(scores: Scores, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return what the choice of token k leads to (N, T): later entropies, and later positions, as sums.

    The entropy at k itself does not depend on token k; its surprisal does.
    """
    what, _ = terms(scores, kind)
    after = what.flip(1).cumsum(1).flip(1)
    if kind != "surprisal":
        after = after - what
    count = scores.mask.flip(1).cumsum(1).flip(1) - scores.mask
    return after, torch.zeros_like(count) if kind == "sequence" else count


def coefficients(scores: Scores, kind: Kind = "token", baseline: bool = True) -> tuple[Tensor, Tensor]:
    """Return the weights of dH_k and of dl_k (N, T) in the first-order change, before division by sum_i b_i.

        dH/d eta = (1 / sum b) sum_i sum_k [dH_k + (A_k - beta_k) dl_k],   A_k = sum_{k' > k} (H_k' - H)

    with beta_k the mean of A_k over the other sequences: what does not depend on token k adds nothing but noise, since
    dl_k has mean 0 given its prefix. Exact in expectation, H and 1 / sum b being ratios of sums.

    Args:
        scores: at the policy that drew the sequences.
        kind: which entropy.
        baseline: whether beta_k is taken away.
    """
    after, count = returns(scores, kind)
    h = entropy(scores, kind).value
    A = (after - h * count) * scores.mask
    if baseline:
        A = (A - others_mean(A, scores.mask)) * scores.mask
    weight = torch.zeros_like(A) if kind == "surprisal" else scores.mask
    # E dl_k = 0: the surprisal's own derivative -dl_k needs no weight either
    return weight, A


def surrogate(logp: Tensor, entropies: Tensor, scores: Scores, kind: Kind = "token", baseline: bool = True) -> Tensor:
    """Return a scalar whose gradient is that of the entropy.

    Args:
        logp: l_k with its graph (N, T).
        entropies: H_k with its graph (N, T).
        scores: the same numbers without.
        kind: which entropy.
        baseline: see :func:`coefficients`.
    """
    on_h, on_l = coefficients(scores, kind, baseline)
    _, share = terms(scores, kind)
    return ((on_h * entropies).sum() + (on_l * logp).sum()) / share.sum()


def first_order(
    scores: Scores, dlogp: Tensor, dentropy: Tensor, kind: Kind = "token", baseline: bool = True
) -> Estimate:
    """Return the derivative of the entropy along a direction.

    Args:
        scores: at the policy that drew the sequences.
        dlogp: derivative of l_k along the direction (N, T).
        dentropy: derivative of H_k (N, T).
        kind: which entropy.
        baseline: see :func:`coefficients`.
    """
    on_h, on_l = coefficients(scores, kind, baseline)
    rows = (on_h * dentropy + on_l * dlogp).sum(1)
    what, share = terms(scores, kind)
    b = share.sum()
    value = rows.sum() / b
    # H inside of A is estimated from the same sequences
    slope = (length_weights(scores, kind, baseline) * dlogp).sum()
    h = what.sum() / b
    moves = (rows - value * share - slope * (what.sum(1) - h * share)) / b
    return Estimate.of(value, rows / b, moves, scores.prompt)


def second_order(
    scores: Scores, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], kind: Kind = "token"
) -> Estimate:
    """Return the second derivative of the entropy along a line of parameters, that of :func:`prefix_weighted` at 0.

    Args:
        scores: at the policy that drew the sequences.
        first: first derivatives of l_k and H_k (N, T).
        second: their second derivatives.
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
    rows = n2 - R * b2 - 2 * R1 * b1
    R2 = rows.sum() / B
    # the delta method through R and R', which stand in the rows
    move0 = (n0 - R * b0) / B
    move1 = (n1 - R * b1 - b1.sum() * move0 - R1 * b0) / B
    moves = (rows - R2 * b0 - b2.sum() * move0 - 2 * b1.sum() * move1) / B
    return Estimate.of(R2, rows / B, moves, scores.prompt)


def first_orders(scores: Scores, rows: Tensor, slopes: Tensor, kind: Kind = "token") -> tuple[Tensor, Tensor]:
    """Return derivatives along many directions at once and their standard errors, (D,) each.

    Args:
        scores: at the policy that drew the sequences.
        rows: contribution of each sequence to each derivative (N, D).
        slopes: derivative of the log-probabilities weighted by :func:`length_weights`, along each direction (D,).
        kind: which entropy.
    """
    what, share = terms(scores, kind)
    b = share.sum()
    h = what.sum() / b
    values = rows.sum(0)
    moves = rows - torch.outer(share, values) / b - torch.outer(what.sum(1) - h * share, slopes) / b
    return values, clustered_columns(moves, scores.prompt)[0]


def length_weights(scores: Scores, kind: Kind = "token", baseline: bool = True) -> Tensor:
    """Return the weights (N, T) of dl_k in the derivative of the denominator, over sum b: what H stands beside in A."""
    _, count = returns(scores, kind)
    if baseline:
        count = (count - others_mean(count, scores.mask)) * scores.mask
    return count / terms(scores, kind)[1].sum()
