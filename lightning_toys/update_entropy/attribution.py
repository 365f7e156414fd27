"""The influence of each sequence, each token and each part of AdamW on the entropy, to first order.

With h the gradient of the entropy on E and v the step's direction, dH/d eta = <h, v>. v is a sum, so that momentum,
decay and every sequence of the batch each have their influence, <h, v_i>, all from one reverse pass over E. A token's
influence needs no gradient of its own: with the preconditioner d of the step (v_i = d * g_i),

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
    score_jvp,
    sequence_gradients,
    trainable_parameters,
    weighted_gradient,
)
from lightning_toys.update_entropy.estimators import (
    EntropyKind,
    Estimate,
    Scores,
    denominator_weights,
    derivative_influences,
    entropy_derivatives,
    first_order_weights,
    ratio_terms,
)
from lightning_toys.update_entropy.forward import InferencePolicy, evaluate
from lightning_toys.update_entropy.losses import Objective
from lightning_toys.update_entropy.sequences import Sequences


@dataclass(frozen=True)
class Update:
    """A batch, the gradients of its sequences, and the step that AdamW takes with them.

    Attributes:
        sequences: the batch U, with rewards.
        weights: w (N_U, T), the loss's gradient being -sum_ik w_ik grad l_ik.
        logp_gradients: grad sum_k l_ik of each sequence (N_U, *shape), by parameter name.
        state: AdamW's settings and moments.
        step: of the whole batch.
        max_norm: bound on the gradient's norm.
        objective: the loss.
    """

    sequences: Sequences
    weights: Tensor
    logp_gradients: Tensors
    state: AdamWState
    step: AdamWStep
    max_norm: float | None
    objective: Objective

    @property
    def sequence_weights(self) -> Tensor:
        """The weight of each sequence's tokens (N_U,): on policy, that of its first token."""
        return self.weights[:, 0]

    def sequence_gradient(self, i: int) -> Tensors:
        """Return g_i, the part of the loss's gradient that sequence i makes, by parameter name."""
        return {n: -float(self.sequence_weights[i]) * s[i] for n, s in self.logp_gradients.items()}

    def sequence_directions(self) -> list[Tensors]:
        """Return v_i of every sequence, at the batch's D and c."""
        return [self.step.precondition(self.sequence_gradient(i)) for i in range(len(self.sequences))]

    def residual(self) -> float:
        """Return |v - momentum - decay - sum_i v_i| / |v|: rounding."""
        return self.step.residual(self.sequence_gradient(i) for i in range(len(self.sequences)))

    def step_without(self, rows: Sequence[int], parameters: Mapping[str, Tensor]) -> AdamWStep:
        """Return the step without some sequences: baseline, averages, clipping and D all recomputed."""
        left = [i for i in range(len(self.sequences)) if i not in set(rows)]
        weights = self.objective.token_weights(self.sequences.take(left), 1)[:, 0]
        gradient = loss_gradient(weights, {n: s[left] for n, s in self.logp_gradients.items()})
        return AdamWStep.from_gradient(parameters, gradient, self.state, self.max_norm)

    def step_with_state(self, state: AdamWState, parameters: Mapping[str, Tensor]) -> AdamWStep:
        """Return the step of the same gradient from another state of AdamW: without momentum, other betas, ..."""
        gradient = loss_gradient(self.sequence_weights, self.logp_gradients)
        return AdamWStep.from_gradient(parameters, gradient, state, self.max_norm)


def loss_gradient(weights: Tensor, logp_gradients: Tensors) -> Tensors:
    """Return -sum_i w_i s_i for weights (N,) and gradients s (N, *shape) by name."""
    return {n: -torch.tensordot(weights.to(s), s, 1) for n, s in logp_gradients.items()}


def make_update(
    model: nn.Module,
    sequences: Sequences,
    state: AdamWState,
    max_norm: float | None = None,
    temperature: float = 1.0,
    chunk: int = 32,
    objective: Objective | None = None,
) -> Update:
    """Return the step that AdamW would take with a batch that the model has just generated.

    Args:
        model: the policy, before the step; its parameters that require a gradient are stepped.
        sequences: U with rewards.
        state: AdamW's settings and moments.
        max_norm: bound on the gradient's norm.
        temperature: the sequences were generated at.
        chunk: sequences of one batched reverse pass.
        objective: the loss; None for Dr. GRPO's.
    """
    objective = objective or Objective()
    width = max(1, *sequences.lengths)
    live = torch.arange(width).unsqueeze(0) < torch.tensor(sequences.lengths).unsqueeze(1)
    weights = objective.token_weights(sequences, width)
    gradients = sequence_gradients(model, sequences, live.double(), None, temperature, chunk)
    gradient = loss_gradient(weights[:, 0], gradients)
    step = AdamWStep.from_gradient(trainable_parameters(model), gradient, state, max_norm)
    return Update(sequences, weights, gradients, state, step, max_norm, objective)


@dataclass(frozen=True)
class FirstOrderInfluences:
    """The influence of a step and of its parts, without standard errors: terms of dH/d eta, nats per unit of eta.

    Attributes:
        total: dH/d eta of the whole step.
        momentum: <h, momentum>.
        decay: <h, decay>.
        sequences: <h, v_i> of each sequence of the batch (N_U,), double precision.
    """

    total: float
    momentum: float
    decay: float
    sequences: Tensor


def token_influences(model: nn.Module, update: Update, h: Tensors, temperature: float = 1.0, chunk: int = 64) -> Tensor:
    """Return the influence of each token of the batch, a term of dH/d eta (N_U, T), by one forward-mode pass over U.

    Args:
        model: the policy.
        update: the batch and the step.
        h: gradient of the entropy, by parameter name.
        temperature: the batch was generated at.
        chunk: sequences in one pass.
    """
    direction = {n: update.step.preconditioner[n] * h[n] for n in h}
    dlogp, _ = score_jvp(model, update.sequences, direction, temperature, chunk)
    return -update.weights.to(dlogp) * dlogp


def first_order_influences(
    model: nn.Module,
    update: Update,
    evaluation: Sequences,
    kind: EntropyKind = "token",
    temperature: float = 1.0,
    chunk: int = 64,
) -> FirstOrderInfluences:
    """Return every first-order influence from one reverse pass over E: <h, v_i> = -w_i <d * h, grad sum_k l_ik>.

    Args:
        model: the policy.
        update: the batch and the step.
        evaluation: E, generated by the policy.
        kind: which entropy.
        temperature: E was generated at.
        chunk: sequences in one pass.
    """
    _, h = entropy_gradient(model, evaluation, kind, temperature, chunk)
    step = update.step
    products = torch.zeros(len(update.sequences), dtype=torch.float64)
    for name, s in update.logp_gradients.items():
        products += (s.flatten(1) @ (step.preconditioner[name] * h[name]).flatten()).double().cpu()
    total, momentum, decay = (dot(h, d) for d in (step.direction, step.momentum, step.decay))
    return FirstOrderInfluences(total, momentum, decay, -update.sequence_weights * products)


@dataclass(frozen=True)
class Sharding:
    """How N evaluation sequences are shared out over processes, and the processes' parts summed.

    Args:
        rank: of this process.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    def local_rows(self, n: int) -> list[int]:
        """Return this process's rows of n: every ``world_size``-th."""
        return list(range(self.rank, n, self.world_size))

    def all_reduce(self, part: Tensor) -> Tensor:
        """Return the sum over processes; the tensor itself is changed."""
        if self.world_size > 1:
            torch.distributed.all_reduce(part)
        return part

    def evaluate(
        self,
        model: nn.Module | InferencePolicy,
        sequences: Sequences,
        temperature: float,
        parameters: Mapping[str, Tensor] | None = None,
        chunk: int = 64,
    ) -> Scores:
        """Return ``forward.evaluate`` of all sequences, each process evaluating its own rows."""
        if self.world_size == 1:
            return evaluate(model, sequences, temperature, parameters, chunk)
        rows = self.local_rows(len(sequences))
        shape = (len(sequences), max(1, *sequences.lengths))
        device = model.device if isinstance(model, InferencePolicy) else next(model.parameters()).device
        whole = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)]
        if rows:
            found = evaluate(model, sequences.take(rows), temperature, parameters, chunk)
            for out, part in zip(whole, (found.logp, found.entropy, found.mask), strict=True):
                out[rows, : part.shape[1]] = part
        logp, h, mask = (self.all_reduce(x) for x in whole)
        return Scores(logp, h, mask, torch.tensor(sequences.prompt_index, device=device))


@dataclass(frozen=True)
class SequenceEntropyGradients:
    """Gradients of an evaluation batch's entropy by sequence, kept so that any direction costs an inner product.

    Attributes:
        scores: of all sequences of E.
        kind: which entropy.
        local_rows: the sequences whose gradients this process has.
        gradients: of each one's term of the entropy (len(local_rows), *shape), by parameter name.
        denominator_gradient: of the local rows, weighted by
            :func:`~lightning_toys.update_entropy.estimators.denominator_weights`; standard errors need it.
        sharding: of E over processes.
    """

    scores: Scores
    kind: EntropyKind
    local_rows: list[int]
    gradients: Tensors
    denominator_gradient: Tensors
    sharding: Sharding

    @property
    def entropy_gradient(self) -> Tensors:
        """h, the gradient of the entropy, by parameter name: summed over sequences and processes."""
        return {n: self.sharding.all_reduce(r.sum(0)) for n, r in self.gradients.items()}

    def directional_derivatives(self, directions: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return contributions (N_E, D), derivatives of the entropy (D,) and their standard errors (D,).

        Args:
            directions: D of them, by parameter name; what one lacks does not move along it.
        """
        rows, denominators = self.products(directions)
        return rows, *entropy_derivatives(self.scores, rows, denominators, self.kind)

    def directional_derivative(self, direction: Mapping[str, Tensor]) -> Estimate:
        """Return the derivative of the entropy along one direction, with each sequence's influence on it."""
        rows, denominators = self.products([direction])
        influence = derivative_influences(self.scores, rows, denominators, self.kind)[:, 0]
        return Estimate.from_influence(rows.sum(), rows[:, 0], influence, self.scores.prompt_index)

    def products(self, directions: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return contributions (N_E, D) and the derivatives of the denominator (D,)."""
        like = self.scores.mask
        rows = torch.zeros(len(like), len(directions), dtype=like.dtype, device=like.device)
        denominators = torch.zeros(len(directions), dtype=like.dtype, device=like.device)
        for j, direction in enumerate(directions):
            for name, v in direction.items():
                rows[self.local_rows, j] += self.gradients[name].flatten(1).double() @ v.flatten().double()
            denominators[j] = dot(direction, self.denominator_gradient)
        return self.sharding.all_reduce(rows), self.sharding.all_reduce(denominators)


def sequence_entropy_gradients(
    model: nn.Module,
    evaluation: Sequences,
    kind: EntropyKind = "token",
    temperature: float = 1.0,
    chunk: int = 32,
    scores: Scores | None = None,
    sharding: Sharding | None = None,
) -> SequenceEntropyGradients:
    """Return the gradient of every sequence's term of the entropy, by batched reverse passes.

    Args:
        model: the policy.
        evaluation: E, generated by it.
        kind: which entropy.
        temperature: E was generated at.
        chunk: sequences in one pass.
        scores: of E, if they are known.
        sharding: of E over processes.
    """
    sharding = sharding or Sharding()
    found = scores or sharding.evaluate(model, evaluation, temperature, None, chunk)
    entropy_weights, logp_weights = first_order_weights(found, kind)
    length_weights = denominator_weights(found, kind)
    b = ratio_terms(found, kind)[1].sum()
    rows = sharding.local_rows(len(evaluation))
    part = evaluation.take(rows)
    gradients = sequence_gradients(model, part, logp_weights[rows] / b, entropy_weights[rows] / b, temperature, chunk)
    denominator_gradient = weighted_gradient(model, part, length_weights[rows], None, temperature, chunk)
    return SequenceEntropyGradients(found, kind, rows, gradients, denominator_gradient, sharding)


# tokens that Clip-Cov and KL-Cov treat differently (Cui et al. 2025, arXiv 2505.22617)


def covariances(logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """Return (l_k - mean l)(A - mean A) of each token (N, T), means over all tokens.

    Its mean is the covariance of log-probability and advantage, which for a tabular softmax policy under policy
    gradient is minus the entropy's rate of change (Cui et al. 2025).

    Args:
        logp: l_k (N, T).
        advantage: A (N,).
        mask: 1 where there is a token (N, T).
    """
    n = mask.sum()
    A = advantage.unsqueeze(1) * mask
    return (logp - (logp * mask).sum() / n) * (A - A.sum() / n) * mask


def clip_cov(cov: Tensor, mask: Tensor, low: float, high: float, fraction: float, u: Tensor) -> Tensor:
    """Return 0 for the tokens whose gradient Clip-Cov drops and 1 for the others (N, T).

    Args:
        cov: :func:`covariances`.
        mask: 1 where there is a token.
        low: least covariance of a token that may be dropped.
        high: greatest.
        fraction: of all tokens, the most that are dropped.
        u: uniforms (N, T), which choose among those within the bounds.
    """
    inside = (cov > low) & (cov < high) & mask.bool()
    count = min(int(inside.sum()), max(1, round(fraction * float(mask.sum()))))
    keep = torch.ones_like(mask)
    if count and bool(inside.any()):
        order = torch.where(inside, u.to(cov), torch.full_like(cov, 2.0)).flatten().argsort()[:count]
        keep.view(-1)[order] = 0
    return keep


def kl_cov(cov: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """Return 1 for the ``fraction`` of tokens with the greatest covariance, those that KL-Cov penalises (N, T)."""
    count = max(1, round(fraction * float(mask.sum())))
    order = torch.where(mask.bool(), cov, torch.full_like(cov, -torch.inf)).flatten().argsort(descending=True)[:count]
    chosen = torch.zeros_like(mask)
    chosen.view(-1)[order] = 1
    return chosen
