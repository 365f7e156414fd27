"""Derivatives of the entropy of evaluation sequences along directions, with standard errors.

Two ways to the same numbers. :class:`SequenceEntropyGradients` keeps the gradient of every sequence's term of the
entropy: N_E times the memory of what is trained, and then any direction costs an inner product.
:class:`ForwardEntropyDerivatives` keeps none: one forward-mode pass over E a direction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_toys.update_entropy.adamw import Tensors, dot
from lightning_toys.update_entropy.derivatives import score_jvp, sequence_gradients, weighted_gradient
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
from lightning_toys.update_entropy.forward import InferencePolicy, evaluate, evaluate_many
from lightning_toys.update_entropy.sequences import Sequences


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
        device = model.device if isinstance(model, InferencePolicy) else next(model.parameters()).device
        found = evaluate(model, sequences.take(rows), temperature, parameters, chunk) if rows else None
        return self.gathered(sequences, rows, found, device)

    def evaluate_many(
        self,
        policy: InferencePolicy,
        sequences: Sequences,
        temperature: float,
        parameters: Sequence[Mapping[str, Tensor]],
        chunk: int = 64,
    ) -> list[Scores]:
        """Return ``forward.evaluate_many`` of all sequences, each process evaluating its own rows."""
        if self.world_size == 1:
            return evaluate_many(policy, sequences, temperature, parameters, chunk)
        rows = self.local_rows(len(sequences))
        found: Sequence[Scores | None] = [None] * len(parameters)
        if rows:
            found = evaluate_many(policy, sequences.take(rows), temperature, parameters, chunk)
        return [self.gathered(sequences, rows, x, policy.device) for x in found]

    def gathered(self, sequences: Sequences, rows: list[int], found: Scores | None, device: torch.device) -> Scores:
        """Return the scores of all sequences from those of this process's rows; None where it has none."""
        shape = (len(sequences), max(1, *sequences.lengths))
        whole = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)]
        if found is not None:
            for out, part in zip(whole, (found.logp, found.entropy, found.mask), strict=True):
                out[rows, : part.shape[1]] = part
        logp, h, mask = (self.all_reduce(x) for x in whole)
        return Scores(logp, h, mask, torch.tensor(sequences.prompt_index, device=device))


class EntropyDerivatives(ABC):
    """The derivative of the entropy of evaluation sequences along any direction.

    Attributes:
        scores: of all sequences of E.
        kind: which entropy.
        sharding: of E over processes.
    """

    scores: Scores
    kind: EntropyKind
    sharding: Sharding

    @property
    @abstractmethod
    def entropy_gradient(self) -> Tensors:
        """h, the gradient of the entropy, by parameter name: summed over sequences and processes."""

    @abstractmethod
    def local_products(self, direction: Mapping[str, Tensor]) -> tuple[list[int], Tensor, float]:
        """Return this process's rows, their contributions (n,), and its part of the denominator's derivative.

        Args:
            direction: by parameter name; what it lacks does not move along it.
        """

    def products(self, directions: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return contributions (N_E, D) and the derivatives of the denominator (D,), one direction at a time."""
        like, columns, denominators = self.scores.mask, [], []
        for direction in directions:
            rows, found, denominator = self.local_products(direction)
            column = torch.zeros(len(like), dtype=like.dtype, device=like.device)
            column[rows] = found
            columns.append(column)
            denominators.append(denominator)
            del direction  # before the next one is made: each is as large as what is trained
        if not columns:
            return like.new_zeros(len(like), 0), like.new_zeros(0)
        both = torch.stack(columns, 1), torch.tensor(denominators, dtype=like.dtype, device=like.device)
        return self.sharding.all_reduce(both[0]), self.sharding.all_reduce(both[1])

    def directional_derivatives(self, directions: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return contributions (N_E, D), derivatives of the entropy (D,) and their standard errors (D,).

        Args:
            directions: D of them, by parameter name; one at a time is held.
        """
        rows, denominators = self.products(directions)
        return rows, *entropy_derivatives(self.scores, rows, denominators, self.kind)

    def directional_derivative(self, direction: Mapping[str, Tensor]) -> Estimate:
        """Return the derivative of the entropy along one direction, with each sequence's influence on it."""
        rows, denominators = self.products([direction])
        influence = derivative_influences(self.scores, rows, denominators, self.kind)[:, 0]
        return Estimate.from_influence(rows.sum(), rows[:, 0], influence, self.scores.prompt_index)


@dataclass(frozen=True)
class SequenceEntropyGradients(EntropyDerivatives):
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
        """See :attr:`EntropyDerivatives.entropy_gradient`."""
        return {n: self.sharding.all_reduce(r.sum(0)) for n, r in self.gradients.items()}

    def local_products(self, direction: Mapping[str, Tensor]) -> tuple[list[int], Tensor, float]:
        """See :meth:`EntropyDerivatives.local_products`."""
        out = torch.zeros(len(self.local_rows), dtype=self.scores.mask.dtype, device=self.scores.mask.device)
        for name, v in direction.items():
            out += self.gradients[name].flatten(1).double() @ v.flatten().double()
        return self.local_rows, out, dot(direction, self.denominator_gradient)


def term_weights(scores: Scores, kind: EntropyKind) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a sequence's term weighs its tokens' H_k, l_k and, of the denominator, l_k with, each (N, T)."""
    on_h, on_logp = first_order_weights(scores, kind)
    b = ratio_terms(scores, kind)[1].sum()
    return on_h / b, on_logp / b, denominator_weights(scores, kind)


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
    rows = sharding.local_rows(len(evaluation))
    part = evaluation.take(rows)
    on_h, on_logp, on_length = (x[rows] for x in term_weights(found, kind))
    gradients = sequence_gradients(model, part, on_logp, on_h, temperature, chunk)
    denominator_gradient = weighted_gradient(model, part, on_length, None, temperature, chunk)
    return SequenceEntropyGradients(found, kind, rows, gradients, denominator_gradient, sharding)


class ForwardEntropyDerivatives(EntropyDerivatives):
    """Derivatives of an evaluation batch's entropy by forward mode: a pass over E a direction, and nothing kept.

    Args:
        model: the policy; its weights must stay as they are.
        evaluation: E, generated by it.
        kind: which entropy.
        temperature: E was generated at.
        chunk: sequences in one pass.
        scores: of E, if they are known.
        sharding: of E over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluation: Sequences,
        kind: EntropyKind = "token",
        temperature: float = 1.0,
        chunk: int = 32,
        scores: Scores | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self.model, self.kind, self.temperature, self.chunk = model, kind, temperature, chunk
        self.sharding = sharding or Sharding()
        self.scores = scores or self.sharding.evaluate(model, evaluation, temperature, None, chunk)
        self.local_rows = self.sharding.local_rows(len(evaluation))
        self.part = evaluation.take(self.local_rows)
        self.on_h, self.on_logp, self.on_length = (x[self.local_rows] for x in term_weights(self.scores, kind))

    @property
    def entropy_gradient(self) -> Tensors:
        """See :attr:`EntropyDerivatives.entropy_gradient`; one reverse pass over E."""
        h = weighted_gradient(self.model, self.part, self.on_logp, self.on_h, self.temperature, self.chunk)
        return {n: self.sharding.all_reduce(g) for n, g in h.items()}

    def local_products(self, direction: Mapping[str, Tensor]) -> tuple[list[int], Tensor, float]:
        """See :meth:`EntropyDerivatives.local_products`; one forward-mode pass over E."""
        dlogp, dentropy = score_jvp(self.model, self.part, direction, self.temperature, self.chunk)
        width = dlogp.shape[1]
        terms = self.on_h[:, :width] * dentropy + self.on_logp[:, :width] * dlogp
        return self.local_rows, terms.sum(1), float((self.on_length[:, :width] * dlogp).sum())
