"""Which sequence, which token, which part of AdamW moves the entropy, to first order.

With h the gradient of the entropy on E and v the step's direction, dH/d eta = <h, v>. v is a sum, so that momentum,
decay and every sequence of the batch have their share, all from one reverse pass over E. A token's share needs no
gradient of its own: with the gain d of the step (v_i = d * g_i),

    <h, v_ik> = -w_ik <d * h, grad l_ik>,

which is the derivative of l_ik along the direction d * h: one forward-mode pass over the batch gives all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_toys.update_entropy.adamw import AdamWState, AdamWStep, Tensors, dot
from lightning_toys.update_entropy.derivatives import (
    entropy_gradient,
    sequence_gradients,
    tangents,
    trainable,
    weighted_gradient,
)
from lightning_toys.update_entropy.estimators import Kind, Scores, coefficients, first_orders, length_weights, terms
from lightning_toys.update_entropy.forward import Passes, evaluate
from lightning_toys.update_entropy.grpo import token_weights
from lightning_toys.update_entropy.sequences import Sequences


@dataclass(frozen=True)
class Update:
    """A batch, the gradients of its sequences, and the step that AdamW takes with them.

    Attributes:
        sequences: the batch U, with rewards.
        weights: w (N_U, T), the loss's gradient being -sum w_ik grad l_ik.
        scores: grad sum_k l_ik of each sequence (N_U, *shape), by name.
        state: AdamW's settings and moments.
        step: of the whole batch.
        max_norm: bound on the gradient's norm.
    """

    sequences: Sequences
    weights: Tensor
    scores: Tensors
    state: AdamWState
    step: AdamWStep
    max_norm: float | None

    @property
    def strengths(self) -> Tensor:
        """The weight of each sequence's tokens (N_U,): on policy all of them weigh the same."""
        return self.weights[:, 0]

    def gradient_of(self, i: int) -> Tensors:
        """Return g_i, the part of sequence i in the loss's gradient."""
        return {n: -float(self.strengths[i]) * s[i] for n, s in self.scores.items()}

    def directions(self) -> list[Tensors]:
        """Return v_i of every sequence, at the batch's D and c."""
        return [self.step.part(self.gradient_of(i)) for i in range(len(self.sequences))]

    def residual(self) -> float:
        """Return |v - momentum - decay - sum_i v_i| / |v|."""
        return self.step.residual(self.gradient_of(i) for i in range(len(self.sequences)))

    def without(self, rows: Sequence[int], parameters: Mapping[str, Tensor]) -> AdamWStep:
        """Return the step without some sequences: group mean, G, Lmax, clipping and D all made anew."""
        left = [i for i in range(len(self.sequences)) if i not in set(rows)]
        weights = token_weights(self.sequences.take(left), 1)[:, 0]
        gradient = loss_gradient(weights, {n: s[left] for n, s in self.scores.items()})
        return AdamWStep.of(parameters, gradient, self.state, self.max_norm)

    def with_state(self, state: AdamWState, parameters: Mapping[str, Tensor]) -> AdamWStep:
        """Return the step of the same gradient from another state: no momentum, other betas, ..."""
        return AdamWStep.of(parameters, loss_gradient(self.strengths, self.scores), state, self.max_norm)


def loss_gradient(weights: Tensor, scores: Tensors) -> Tensors:
    """Return -sum_i w_i s_i for weights (N,) and gradients s (N, *shape) by name."""
    return {n: -torch.tensordot(weights.to(s), s, 1) for n, s in scores.items()}


def make_update(
    model: nn.Module,
    sequences: Sequences,
    state: AdamWState,
    max_norm: float | None = None,
    temperature: float = 1.0,
    chunk: int = 32,
) -> Update:
    """Rebuild the step that AdamW would take with a batch that the model just drew.

    Args:
        model: the policy, before the step.
        sequences: U with rewards.
        state: AdamW's settings and moments.
        max_norm: bound on the gradient's norm.
        temperature: the sequences were drawn at.
        chunk: sequences of one batched reverse pass.
    """
    width = max(1, *sequences.lengths)
    live = torch.arange(width).unsqueeze(0) < torch.tensor(sequences.lengths).unsqueeze(1)
    weights = token_weights(sequences, width)
    scores = sequence_gradients(model, sequences, live.double(), None, temperature, chunk)
    step = AdamWStep.of(trainable(model), loss_gradient(weights[:, 0], scores), state, max_norm)
    return Update(sequences, weights, scores, state, step, max_norm)


@dataclass(frozen=True)
class Slopes:
    """dH/d eta of a step and of its parts, without their errors.

    Attributes:
        total: of the whole step.
        momentum: its share.
        decay: its share.
        sequences: of each sequence of the batch (N_U,).
    """

    total: float
    momentum: float
    decay: float
    sequences: Tensor


def token_slopes(model: nn.Module, update: Update, h: Tensors, temperature: float = 1.0, chunk: int = 64) -> Tensor:
    """Return the share of each token of the batch in dH/d eta (N_U, T), by one forward-mode pass over the batch."""
    along = {n: update.step.gain[n] * h[n] for n in h}
    dlogp, _ = tangents(model, update.sequences, along, temperature, chunk)
    return -update.weights.to(dlogp) * dlogp


def slopes(
    model: nn.Module,
    update: Update,
    evaluation: Sequences,
    kind: Kind = "token",
    temperature: float = 1.0,
    chunk: int = 64,
) -> Slopes:
    """Return every first-order share from one reverse pass over E: <h, v_i> = -w_i <d * h, grad sum_k l_ik>."""
    _, h = entropy_gradient(model, evaluation, kind, temperature, chunk)
    step = update.step
    each = torch.zeros(len(update.sequences), dtype=torch.float64)
    for name, s in update.scores.items():
        each += (s.flatten(1) @ (step.gain[name] * h[name]).flatten()).double().cpu()
    whole = [dot(h, d) for d in (step.direction, step.momentum, step.decay)]
    return Slopes(whole[0], whole[1], whole[2], -update.strengths * each)


@dataclass(frozen=True)
class Ranks:
    """Which of N evaluation sequences this process looks at, and how the processes' parts come together."""

    rank: int = 0
    world: int = 1

    def share(self, n: int) -> list[int]:
        """Return this process's rows of n."""
        return list(range(self.rank, n, self.world))

    def add_up(self, part: Tensor) -> Tensor:
        """Return the sum over processes."""
        if self.world > 1:
            torch.distributed.all_reduce(part)
        return part

    def scores(
        self,
        model: nn.Module | Passes,
        sequences: Sequences,
        temperature: float,
        parameters: Mapping[str, Tensor] | None = None,
        chunk: int = 64,
    ) -> Scores:
        """Return :func:`evaluate`'s scores of all sequences, each process evaluating its own."""
        if self.world == 1:
            return evaluate(model, sequences, temperature, parameters, chunk)
        rows = self.share(len(sequences))
        shape = (len(sequences), max(1, *sequences.lengths))
        device = model.device if isinstance(model, Passes) else next(model.parameters()).device
        whole = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)]
        if rows:
            found = evaluate(model, sequences.take(rows), temperature, parameters, chunk)
            for out, part in zip(whole, (found.logp, found.entropy, found.mask), strict=True):
                out[rows, : part.shape[1]] = part
        logp, h, mask = (self.add_up(x) for x in whole)
        return Scores(logp, h, mask, torch.tensor(sequences.prompt, device=device))


@dataclass(frozen=True)
class EntropyRows:
    """Gradients of an evaluation batch, kept so that any direction costs an inner product.

    Attributes:
        scores: l_k and H_k.
        kind: which entropy.
        mine: the sequences whose gradients this process has.
        rows: gradient of each one's share in the entropy (len(mine), *shape), by name.
        length: gradient that the error of the mean entropy goes with, see :func:`length_weights`; of ``mine`` alone.
        ranks: the processes.
    """

    scores: Scores
    kind: Kind
    mine: list[int]
    rows: Tensors
    length: Tensors
    ranks: Ranks

    @property
    def gradient(self) -> Tensors:
        """h, that of the entropy."""
        return {n: self.ranks.add_up(r.sum(0)) for n, r in self.rows.items()}

    def along(self, directions: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return contributions (N_E, D), derivatives (D,) and their standard errors (D,) along directions."""
        like = self.scores.mask
        rows = torch.zeros(len(like), len(directions), dtype=like.dtype, device=like.device)
        lengths = torch.zeros(len(directions), dtype=like.dtype, device=like.device)
        for j, d in enumerate(directions):
            for name, v in d.items():  # a parameter that a direction lacks does not move
                rows[self.mine, j] += self.rows[name].flatten(1).double() @ v.flatten().double()
            lengths[j] = dot(d, self.length)
        rows, lengths = self.ranks.add_up(rows), self.ranks.add_up(lengths)
        return rows, *first_orders(self.scores, rows, lengths, self.kind)


def entropy_rows(
    model: nn.Module,
    evaluation: Sequences,
    kind: Kind = "token",
    temperature: float = 1.0,
    chunk: int = 32,
    scores: Scores | None = None,
    ranks: Ranks | None = None,
) -> EntropyRows:
    """Return the gradients of every sequence's share in the entropy, by batched reverse passes.

    Args:
        model: the policy.
        evaluation: E, drawn from it.
        kind: which entropy.
        temperature: they were drawn at.
        chunk: sequences in one pass.
        scores: of E, if they are known.
        ranks: processes among which E is divided.
    """
    ranks = ranks or Ranks()
    found = scores or ranks.scores(model, evaluation, temperature, None, chunk)
    on_h, on_l = coefficients(found, kind)
    on_length = length_weights(found, kind)
    b = terms(found, kind)[1].sum()
    mine = ranks.share(len(evaluation))
    part = evaluation.take(mine)
    rows = sequence_gradients(model, part, on_l[mine] / b, on_h[mine] / b, temperature, chunk)
    length = weighted_gradient(model, part, on_length[mine], None, temperature, chunk)
    return EntropyRows(found, kind, mine, rows, length, ranks)


# tokens that a method would treat otherwise


def covariances(logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """Return (l_k - mean l)(A - mean A) of each token (N, T), means over all tokens (Cui et al. 2025, 2505.22617).

    Its mean is the covariance of log-probability and advantage, which for a tabular softmax policy under policy
    gradient is minus the entropy's rate of change.
    """
    n = mask.sum()
    A = advantage.unsqueeze(1) * mask
    return (logp - (logp * mask).sum() / n) * (A - A.sum() / n) * mask


def clip_cov(cov: Tensor, mask: Tensor, low: float, high: float, share: float, u: Tensor) -> Tensor:
    """Return 0 for the tokens whose gradient Clip-Cov drops and 1 for the others (N, T).

    Args:
        cov: :func:`covariances`.
        mask: 1 where there is a token.
        low: least covariance of a token that may be dropped.
        high: greatest.
        share: of all tokens, how many are dropped at most.
        u: uniforms (N, T), which choose among those within the bounds.
    """
    inside = (cov > low) & (cov < high) & mask.bool()
    count = min(int(inside.sum()), max(1, round(share * float(mask.sum()))))
    keep = torch.ones_like(mask)
    if count and bool(inside.any()):
        order = torch.where(inside, u.to(cov), torch.full_like(cov, 2.0)).flatten().argsort()[:count]
        keep.view(-1)[order] = 0
    return keep


def kl_cov(cov: Tensor, mask: Tensor, share: float) -> Tensor:
    """Return 1 for the ``share`` of tokens with the greatest covariance, those that KL-Cov holds back (N, T)."""
    count = max(1, round(share * float(mask.sum())))
    order = torch.where(mask.bool(), cov, torch.full_like(cov, -torch.inf)).flatten().argsort(descending=True)[:count]
    chosen = torch.zeros_like(mask)
    chosen.view(-1)[order] = 1
    return chosen
