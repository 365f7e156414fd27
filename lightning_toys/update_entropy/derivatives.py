"""Derivatives of a policy's log-probabilities and entropies in its parameters: reverse, forward, and twice forward.

Forward mode needs attention that is written out (``attn_implementation="eager"``): fused kernels have no such rule.
Twice forward needs more: torch 2.13's layer_norm gives a wrong second derivative there without a word, and silu none
at all (tests/test_entropy_derivatives.py holds both against finite differences). :class:`WrittenOut` replaces them.
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
from lightning_toys.update_entropy.estimators import Kind, Scores, coefficients, surrogate, terms
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.sequences import (
    Packed,
    Sequences,
    attention,
    chunks,
    gathered,
    in_eval,
    pack,
    policy_scores,
)

Pair = tuple[Tensor, Tensor]  # of l_k and of H_k, each (N, T)


class WrittenOut(TorchFunctionMode):
    """Puts elementary operations in the place of layer_norm, rms_norm and silu while it is entered."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, or what it is made of."""
        written = {F.layer_norm: layer_norm, F.rms_norm: rms_norm, F.silu: silu}.get(func, func)
        return written(*args, **(kwargs or {}))


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias over the last axes."""
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    out = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Return x / sqrt(mean x^2 + eps) * weight over the last axes."""
    axes = tuple(range(-len(shape), 0))
    floor = torch.finfo(x.dtype).eps if eps is None else eps
    out = x * (x.square().mean(axes, keepdim=True) + floor).rsqrt()
    return out if weight is None else out * weight


def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """Return x sigmoid(x)."""
    return x * torch.sigmoid(x)


def trainable(model: nn.Module) -> Tensors:
    """Return the parameters that an optimiser would step, detached, by name."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def moved(parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor], eta: float) -> Tensors:
    """Return theta + eta v for the names of ``direction``."""
    return {n: parameters[n] + eta * v for n, v in direction.items()}


def tangents(
    model: nn.Module, sequences: Sequences, direction: Mapping[str, Tensor], temperature: float = 1.0, chunk: int = 64
) -> Pair:
    """Return the derivatives of l_k and H_k (N, T) along a direction.

    Args:
        model: the policy.
        sequences: N of them.
        direction: by the parameters' names.
        temperature: of the law the tokens are drawn from.
        chunk: sequences in one pass.
    """
    theta = {n: dict(model.named_parameters())[n].detach() for n in direction}
    device = next(model.parameters()).device
    parts: list[tuple[list[int], tuple[Tensor, ...]]] = []
    with in_eval(model), attention(model, "eager"), torch.no_grad():
        for rows in chunks(sequences, chunk):
            packed = pack(sequences.take(rows), device)

            def f(p: Tensors) -> Pair:
                return policy_scores(model, packed, temperature, p)  # noqa: B023

            found: Any = jvp(f, (theta,), (dict(direction),))[1]
            parts.append((rows, found))
    first, second = gathered(parts, len(sequences), max(1, *sequences.lengths))
    return first, second


def curvatures(
    model: nn.Module, sequences: Sequences, direction: Mapping[str, Tensor], temperature: float = 1.0, chunk: int = 64
) -> tuple[Pair, Pair]:
    """Return first and second derivatives of l_k and H_k (N, T) along a direction; arguments as :func:`tangents`."""
    theta = {n: dict(model.named_parameters())[n].detach() for n in direction}
    device = next(model.parameters()).device
    parts: list[tuple[list[int], tuple[Tensor, ...]]] = []
    v = dict(direction)
    with in_eval(model), attention(model, "eager"), torch.no_grad():
        for rows in chunks(sequences, chunk):
            packed = pack(sequences.take(rows), device)

            def f(p: Tensors) -> Pair:
                return policy_scores(model, packed, temperature, p)  # noqa: B023

            def slope(p: Tensors) -> Any:
                return jvp(f, (p,), (v,))[1]

            with WrittenOut():
                both: Any = jvp(slope, (theta,), (v,))
            parts.append((rows, (*both[0], *both[1])))
    a, b, c, d = gathered(parts, len(sequences), max(1, *sequences.lengths))
    return (a, b), (c, d)


def weighted_gradient(
    model: nn.Module,
    sequences: Sequences,
    on_logp: Tensor,
    on_entropy: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 64,
) -> Tensors:
    """Return the gradient of sum_ik (a_ik l_ik + b_ik H_ik) in the trainable parameters, in eval mode.

    Args:
        model: the policy.
        sequences: N of them.
        on_logp: a (N, T).
        on_entropy: b (N, T), if not 0.
        temperature: of the law the tokens are drawn from.
        chunk: sequences in one pass.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    total: list[Tensor] | None = None
    with in_eval(model), torch.enable_grad():
        for rows in chunks(sequences, chunk):
            packed = pack(sequences.take(rows), device)
            logp, h = policy_scores(model, packed, temperature)
            index, width = torch.tensor(rows), logp.shape[1]
            value = (on_logp[index, :width].to(logp) * logp).sum()
            if on_entropy is not None:
                value = value + (on_entropy[index, :width].to(h) * h).sum()
            found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)]
            total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
    assert total is not None
    return dict(zip(named, total, strict=True))


def entropy_gradient(
    model: nn.Module,
    sequences: Sequences,
    kind: Kind = "token",
    temperature: float = 1.0,
    chunk: int = 64,
    scores: Scores | None = None,
) -> tuple[Scores, Tensors]:
    """Return the scores of sequences that the model drew, and the gradient of its entropy, by one reverse pass.

    Args:
        model: the policy.
        sequences: drawn from it.
        kind: which entropy.
        temperature: they were drawn at.
        chunk: sequences in one pass.
        scores: of these sequences, if they are known already.
    """
    if scores is None and len(sequences) <= chunk:  # one forward pass for both
        return whole_gradient(model, sequences, kind, temperature)
    found = scores or evaluate(model, sequences, temperature, chunk=chunk)
    on_h, on_l = coefficients(found, kind)
    b = terms(found, kind)[1].sum()
    return found, weighted_gradient(model, sequences, on_l / b, on_h / b, temperature, chunk)


def whole_gradient(model: nn.Module, sequences: Sequences, kind: Kind, temperature: float) -> tuple[Scores, Tensors]:
    """Return :func:`entropy_gradient` of sequences that fit into one pass."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    with in_eval(model), torch.enable_grad():
        packed = pack(sequences, device)
        logp, h = policy_scores(model, packed, temperature)
        scores = Scores(logp.detach(), h.detach(), packed.mask, torch.tensor(sequences.prompt, device=device))
        value = surrogate(logp, h, scores, kind)
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
    return scores, dict(zip(named, found, strict=True))


def sequence_gradients(
    model: nn.Module,
    sequences: Sequences,
    on_logp: Tensor,
    on_entropy: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 32,
) -> Tensors:
    """Return each sequence's part of :func:`weighted_gradient`, (N, *shape) by name: batched reverse passes.

    Arguments as :func:`weighted_gradient`; memory grows with N times the number of trainable parameters.
    """
    theta = trainable(model)
    device = next(model.parameters()).device
    out = {n: torch.empty(len(sequences), *p.shape, dtype=p.dtype, device=p.device) for n, p in theta.items()}
    weights = [on_logp.to(device), (torch.zeros_like(on_logp) if on_entropy is None else on_entropy).to(device)]
    with in_eval(model), attention(model, "eager"):
        for rows in chunks(sequences, chunk):
            packed = pack(sequences.take(rows), device)
            index, width = torch.tensor(rows, device=device), packed.mask.shape[1]

            def value(p: Tensors, a: Tensor, b: Tensor, *row: Tensor) -> Tensor:
                tokens, attention, position, column, target, mask = (x.unsqueeze(0) for x in row)
                one = Packed(tokens, attention, position, column, target, mask, packed.first)  # noqa: B023
                logp, h = policy_scores(model, one, temperature, p)
                return (a * logp + b * h).sum()

            columns = [*(w[index, :width] for w in weights), *packed[:-1]]
            found = vmap(grad(value), in_dims=(None, *[0] * len(columns)))(theta, *columns)
            for name, g in found.items():
                out[name][index] = g
    return out
