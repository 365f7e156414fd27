"""Derivatives of a policy's log-probabilities and entropies in its parameters: reverse, forward, and twice forward.

Forward mode needs ``attn_implementation="eager"``: fused attention kernels have no rule for it. Twice forward needs
more: torch 2.13's layer_norm silently gives a wrong second derivative there, and silu none at all
(tests/update_entropy/test_derivatives.py checks both against finite differences). :class:`DecomposedOps` replaces them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode

from lightning_toys.update_entropy.adamw import Tensors
from lightning_toys.update_entropy.estimators import (
    EntropyKind,
    Scores,
    entropy_surrogate,
    first_order_weights,
    ratio_terms,
)
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.sequences import (
    PaddedBatch,
    Sequences,
    attention_implementation,
    eval_mode,
    length_sorted_chunks,
    merge_chunks,
    pad_batch,
    policy_scores,
)

TokenDerivatives = tuple[Tensor, Tensor]  # of l_k and of H_k, each (N, T)


class DecomposedOps(TorchFunctionMode):
    """Computes layer_norm, rms_norm and silu by elementary operations while it is entered.

    >>> with DecomposedOps():
    ...     F.silu(torch.tensor(0.0))
    tensor(0.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, or its decomposition."""
        decomposed = {F.layer_norm: layer_norm, F.rms_norm: rms_norm, F.silu: silu}.get(func, func)
        return decomposed(*args, **(kwargs or {}))


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias over the last axes, those of ``shape``."""
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    out = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Return x / sqrt(mean x^2 + eps) * weight over the last axes, those of ``shape``."""
    axes = tuple(range(-len(shape), 0))
    floor = torch.finfo(x.dtype).eps if eps is None else eps
    out = x * (x.square().mean(axes, keepdim=True) + floor).rsqrt()
    return out if weight is None else out * weight


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """Return x sigmoid(x)."""
    return x * torch.sigmoid(x)


def trainable_parameters(model: nn.Module) -> Tensors:
    """Return the parameters that require a gradient, detached, by name."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def perturbed(parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor], eta: float) -> Tensors:
    """Return theta + eta v for the names of ``direction``.

    >>> perturbed({"w": torch.tensor(1.0)}, {"w": torch.tensor(4.0)}, 0.5)
    {'w': tensor(3.)}
    """
    return {n: parameters[n] + eta * v for n, v in direction.items()}


def score_jvp(
    model: nn.Module, sequences: Sequences, direction: Mapping[str, Tensor], temperature: float = 1.0, chunk: int = 64
) -> TokenDerivatives:
    """Return the derivatives of l_k and H_k (N, T) along a direction in parameter space, by forward mode.

    Args:
        model: the policy.
        sequences: N of them.
        direction: v, by the parameters' names; what it lacks does not move.
        temperature: of the distribution that tokens are sampled from.
        chunk: sequences in one pass.
    """
    theta = {n: dict(model.named_parameters())[n].detach() for n in direction}
    device = next(model.parameters()).device
    parts: list[tuple[list[int], tuple[Tensor, ...]]] = []
    v = dict(direction)  # once, where it is computed when it is asked for
    with eval_mode(model), attention_implementation(model, "eager"), torch.no_grad():
        for rows in length_sorted_chunks(sequences, chunk):
            batch = pad_batch(sequences.take(rows), device)

            def f(p: Tensors) -> TokenDerivatives:
                return policy_scores(model, batch, temperature, p)  # noqa: B023

            found: Any = jvp(f, (theta,), (v,))[1]
            parts.append((rows, found))
    if not parts:  # a process that has none of the sequences
        nothing = torch.zeros(0, 1, dtype=torch.float64, device=device)
        return nothing, nothing
    first, second = merge_chunks(parts, len(sequences), max(1, *sequences.lengths))
    return first, second


def score_second_jvp(
    model: nn.Module, sequences: Sequences, direction: Mapping[str, Tensor], temperature: float = 1.0, chunk: int = 64
) -> tuple[TokenDerivatives, TokenDerivatives]:
    """Return first and second derivatives of l_k and H_k (N, T) along a direction, by forward mode over forward mode.

    Arguments as :func:`score_jvp`.
    """
    theta = {n: dict(model.named_parameters())[n].detach() for n in direction}
    device = next(model.parameters()).device
    parts: list[tuple[list[int], tuple[Tensor, ...]]] = []
    v = dict(direction)
    with eval_mode(model), attention_implementation(model, "eager"), torch.no_grad():
        for rows in length_sorted_chunks(sequences, chunk):
            batch = pad_batch(sequences.take(rows), device)

            def f(p: Tensors) -> TokenDerivatives:
                return policy_scores(model, batch, temperature, p)  # noqa: B023

            def first_derivative(p: Tensors) -> Any:
                return jvp(f, (p,), (v,))[1]

            with DecomposedOps():
                both: Any = jvp(first_derivative, (theta,), (v,))
            parts.append((rows, (*both[0], *both[1])))
    if not parts:  # a process that has none of the sequences
        nothing = torch.zeros(0, 1, dtype=torch.float64, device=device)
        return (nothing, nothing), (nothing, nothing)
    a, b, c, d = merge_chunks(parts, len(sequences), max(1, *sequences.lengths))
    return (a, b), (c, d)


def weighted_gradient(
    model: nn.Module,
    sequences: Sequences,
    logp_weights: Tensor,
    entropy_weights: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 64,
) -> Tensors:
    """Return the gradient of sum_ik (a_ik l_ik + b_ik H_ik) in the trainable parameters, in eval mode.

    Args:
        model: the policy.
        sequences: N of them.
        logp_weights: a (N, T).
        entropy_weights: b (N, T), or None for 0.
        temperature: of the distribution that tokens are sampled from.
        chunk: sequences in one pass.
    """
    # leaves of our own on the same memory: a backward pass adds each parameter's gradient to what is there as soon as
    # it has it, so that one copy is held; no hook of the model's own parameters (DDP's) hears of it
    leaves = {n: p.requires_grad_() for n, p in trainable_parameters(model).items()}
    device = next(model.parameters()).device
    with eval_mode(model), torch.enable_grad():
        for rows in length_sorted_chunks(sequences, chunk):
            batch = pad_batch(sequences.take(rows), device)
            logp, h = policy_scores(model, batch, temperature, leaves)
            index, width = torch.tensor(rows), logp.shape[1]
            value = (logp_weights[index, :width].to(logp) * logp).sum()
            if entropy_weights is not None:
                value = value + (entropy_weights[index, :width].to(h) * h).sum()
            torch.autograd.backward(value)
            del logp, h, value  # the graph, before the next one is made
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()}


def entropy_gradient(
    model: nn.Module,
    sequences: Sequences,
    kind: EntropyKind = "token",
    temperature: float = 1.0,
    chunk: int = 64,
    scores: Scores | None = None,
) -> tuple[Scores, Tensors]:
    """Return the scores of sequences that the model generated, and the gradient of its entropy, by one reverse pass.

    Args:
        model: the policy.
        sequences: generated by it.
        kind: which entropy.
        temperature: they were generated at.
        chunk: sequences in one pass.
        scores: of these sequences, if they are known already.
    """
    if scores is None and len(sequences) <= chunk:  # one forward pass for both
        return entropy_gradient_in_one_pass(model, sequences, kind, temperature)
    found = scores or evaluate(model, sequences, temperature, chunk=chunk)
    entropy_weights, logp_weights = first_order_weights(found, kind)
    b = ratio_terms(found, kind)[1].sum()
    return found, weighted_gradient(model, sequences, logp_weights / b, entropy_weights / b, temperature, chunk)


def entropy_gradient_in_one_pass(
    model: nn.Module, sequences: Sequences, kind: EntropyKind, temperature: float
) -> tuple[Scores, Tensors]:
    """Return :func:`entropy_gradient` of sequences that fit into one pass, forward and backward."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    with eval_mode(model), torch.enable_grad():
        batch = pad_batch(sequences, device)
        logp, h = policy_scores(model, batch, temperature)
        scores = Scores(logp.detach(), h.detach(), batch.mask, torch.tensor(sequences.prompt_index, device=device))
        value = entropy_surrogate(logp, h, scores, kind)
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
    return scores, dict(zip(named, found, strict=True))


def sequence_gradients(
    model: nn.Module,
    sequences: Sequences,
    logp_weights: Tensor,
    entropy_weights: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 32,
) -> Tensors:
    """Return each sequence's part of :func:`weighted_gradient`, (N, *shape) by name, by batched reverse passes.

    Arguments as :func:`weighted_gradient`; memory is N times that of the trainable parameters.
    """
    theta = trainable_parameters(model)
    device = next(model.parameters()).device
    out = {n: torch.empty(len(sequences), *p.shape, dtype=p.dtype, device=p.device) for n, p in theta.items()}
    on_h = torch.zeros_like(logp_weights) if entropy_weights is None else entropy_weights
    weights = [logp_weights.to(device), on_h.to(device)]
    with eval_mode(model), attention_implementation(model, "eager"):
        for rows in length_sorted_chunks(sequences, chunk):
            batch = pad_batch(sequences.take(rows), device)
            index, width = torch.tensor(rows, device=device), batch.mask.shape[1]

            def value(p: Tensors, a: Tensor, b: Tensor, *row: Tensor) -> Tensor:
                ids, attention, positions, columns, targets, mask = (x.unsqueeze(0) for x in row)
                one = PaddedBatch(ids, attention, positions, columns, targets, mask, batch.first_column)  # noqa: B023
                logp, h = policy_scores(model, one, temperature, p)
                return (a * logp + b * h).sum()

            arguments = [*(w[index, :width] for w in weights), *batch[:-1]]
            found = vmap(grad(value), in_dims=(None, *[0] * len(arguments)))(theta, *arguments)
            for name, g in found.items():
                out[name][index] = g
    return out
