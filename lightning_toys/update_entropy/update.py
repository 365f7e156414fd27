"""A batch, the gradients of its sequences, and the step that AdamW takes with them.

The loss's gradient is a sum over sequences, g = sum_i g_i with g_i = -sum_k (w_ik grad l_ik + e_ik grad H_ik): w from
the advantages, ratios and KL penalty, e from the entropy bonus. Where all tokens of a response have one weight, and
there is memory for it, the gradients of sum_k l_ik are kept; every other batch of the same sequences is then a sum of
them. Else each gradient is taken again when it is wanted, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_toys.update_entropy.adamw import AdamWState, AdamWStep, Tensors
from lightning_toys.update_entropy.derivatives import sequence_gradients, trainable_parameters, weighted_gradient
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.objective import Objective
from lightning_toys.update_entropy.reference import reference_logp
from lightning_toys.update_entropy.sequences import Sequences


@dataclass(frozen=True)
class Update:
    """A batch, the gradients of its sequences, and the step that AdamW takes with them.

    Attributes:
        model: the policy, before the step.
        sequences: the batch U, with rewards or advantages.
        weights: w (N_U, T), double precision.
        entropy_weights: e (N_U, T); None without an entropy bonus.
        gradient: g, by parameter name.
        logp_gradients: grad sum_k l_ik of each sequence (N_U, *shape), by parameter name; None where they are not kept.
        state: AdamW's settings and moments.
        step: of the whole batch.
        max_norm: bound on the gradient's norm.
        objective: the loss.
        temperature: the sequences were generated at.
        logp: l_k of the policy (N_U, T), where ratios or a penalty want it.
        reference_logp: l_k of the reference (N_U, T), where there is a KL penalty.
        keep_gradients: whether steps are kept too, or computed anew whenever they are asked for.
        chunk: sequences of one reverse pass, where gradients are taken anew.
    """

    model: nn.Module
    sequences: Sequences
    weights: Tensor
    entropy_weights: Tensor | None
    gradient: Tensors
    logp_gradients: Tensors | None
    state: AdamWState
    step: AdamWStep
    max_norm: float | None
    objective: Objective
    temperature: float = 1.0
    logp: Tensor | None = None
    reference_logp: Tensor | None = None
    keep_gradients: bool = True
    chunk: int = 64

    @property
    def sequence_weights(self) -> Tensor:
        """The mean weight of each sequence's tokens (N_U,)."""
        return self.weights.sum(1) / torch.tensor(self.sequences.lengths).clamp(min=1)

    def sequence_gradient(self, i: int) -> Tensors:
        """Return g_i, the part of the loss's gradient that sequence i makes, by parameter name."""
        if self.logp_gradients is not None:
            return {n: -float(self.weights[i, 0]) * s[i] for n, s in self.logp_gradients.items()}
        e = None if self.entropy_weights is None else -self.entropy_weights[[i]]
        return weighted_gradient(self.model, self.sequences.take([i]), -self.weights[[i]], e, self.temperature)

    def sequence_direction(self, i: int) -> Tensors:
        """Return v_i of a sequence, at the batch's D and c."""
        return self.step.precondition_in_place(self.sequence_gradient(i))

    def sequence_directions(self) -> Iterator[Tensors]:
        """Yield v_i of every sequence, one at a time."""
        return (self.sequence_direction(i) for i in range(len(self.sequences)))

    def residual(self) -> float:
        """Return |v - momentum - decay - sum_i v_i| / |v|: rounding."""
        return self.step.residual(self.sequence_gradient(i) for i in range(len(self.sequences)))

    def step_without(self, rows: Sequence[int], parameters: Mapping[str, Tensor]) -> AdamWStep:
        """Return the step without some sequences: baseline, averages, clipping and D all recomputed.

        Advantages that came with the batch stay as they are.
        """
        left = [i for i in range(len(self.sequences)) if i not in set(rows)]
        part, width = self.sequences.take(left), self.weights.shape[1]
        logp, reference = (None if x is None else x[left] for x in (self.logp, self.reference_logp))
        weights = self.objective.token_weights(part, width, logp, reference)
        e = self.objective.entropy_weights(part, width)
        if self.logp_gradients is not None and e is None and has_one_weight_a_response(weights, part.lengths):
            whole = weights.new_zeros(len(self.sequences))
            whole[left] = weights[:, 0]
            gradient = loss_gradient(whole, self.logp_gradients)  # no copy of the other sequences' gradients
        else:
            bonus = None if e is None else -e
            gradient = weighted_gradient(self.model, part, -weights, bonus, self.temperature, self.chunk)
        return AdamWStep.from_gradient(parameters, gradient, self.state, self.max_norm, self.keep_gradients)

    def step_with_state(self, state: AdamWState, parameters: Mapping[str, Tensor]) -> AdamWStep:
        """Return the step of the same gradient from another state of AdamW: without momentum, other betas, ..."""
        return AdamWStep.from_gradient(parameters, self.gradient, state, self.max_norm, self.keep_gradients)

    def step_with_tokens(self, keep: Tensor, parameters: Mapping[str, Tensor], chunk: int = 64) -> AdamWStep:
        """Return the step in which only some tokens, 1 in ``keep`` (N_U, T), have a gradient."""
        kept = keep.to(self.weights)
        e = None if self.entropy_weights is None else -self.entropy_weights * kept
        gradient = weighted_gradient(self.model, self.sequences, -self.weights * kept, e, self.temperature, chunk)
        return AdamWStep.from_gradient(parameters, gradient, self.state, self.max_norm, self.keep_gradients)


def has_one_weight_a_response(weights: Tensor, lengths: Sequence[int]) -> bool:
    """Whether all tokens of each response have one weight.

    Args:
        weights: (N, T).
        lengths: of the responses.

    >>> has_one_weight_a_response(torch.tensor([[2.0, 2.0], [1.0, 0.0]]), [2, 1])
    True
    >>> has_one_weight_a_response(torch.tensor([[2.0, 2.0], [1.0, 0.0]]), [2, 2])
    False
    """
    if not len(lengths):
        return True
    live = torch.arange(weights.shape[1]).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    return bool(((weights - weights[:, :1]) * live).abs().max() <= 1e-9 * weights.abs().max())


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
    reference: nn.Module | None = None,
    keep_gradients: bool = True,
) -> Update:
    """Return the step that AdamW would take with a batch.

    Args:
        model: the policy, before the step; its parameters that require a gradient are stepped.
        sequences: U with rewards or advantages; with ``old_logp``, of the policy that generated it, ratios differ from
            1.
        state: AdamW's settings and moments.
        max_norm: bound on the gradient's norm.
        temperature: the sequences were generated at.
        chunk: sequences of one batched reverse pass.
        objective: the loss; None for Dr. GRPO's.
        reference: of the KL penalty, where there is one; None: the policy without its adapter.
        keep_gradients: whether the gradient of each sequence may be kept, N_U times the memory of what is trained.
    """
    objective = objective or Objective()
    width = max(1, *sequences.lengths)
    logp = evaluate(model, sequences, temperature, chunk=chunk).logp if sequences.old_logp or objective.beta else None
    other = reference_logp(model, reference, sequences, temperature, chunk) if objective.beta else None
    weights = objective.token_weights(sequences, width, logp, other)
    e = objective.entropy_weights(sequences, width)
    kept: Tensors | None = None
    if keep_gradients and e is None and has_one_weight_a_response(weights, sequences.lengths):
        live = torch.arange(width).unsqueeze(0) < torch.tensor(sequences.lengths).unsqueeze(1)
        kept = sequence_gradients(model, sequences, live.double(), None, temperature, chunk)
        gradient = loss_gradient(weights[:, 0], kept)
    else:
        gradient = weighted_gradient(model, sequences, -weights, None if e is None else -e, temperature, chunk)
    step = AdamWStep.from_gradient(trainable_parameters(model), gradient, state, max_norm, keep_gradients)
    return Update(
        model, sequences, weights, e, gradient, kept, state, step, max_norm, objective, temperature, logp, other,
        keep_gradients, chunk,
    )  # fmt: skip
