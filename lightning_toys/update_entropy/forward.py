"""Forward passes without derivatives, as a probe makes them by the hundred at slightly different weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from lightning_toys.update_entropy.adamw import Tensors
from lightning_toys.update_entropy.estimators import Scores
from lightning_toys.update_entropy.sequences import (
    PaddingSide,
    Sequences,
    attention_implementation,
    eval_mode,
    length_sorted_chunks,
    merge_chunks,
    pad_batch,
    policy_scores,
    require_numbers,
)


class InferencePolicy:
    """A policy prepared for many passes: in eval mode, LoRA merged into its base matrices, fused attention.

    W + scale B A once, in place of two more products a matrix and pass and of peft's own Python, saves a fifth of a
    small model's pass. Only for passes without derivatives, and only within :func:`prepared_for_inference`; an adapter
    of another kind is not merged.

    Args:
        model: the policy.

    Attributes:
        parameters: the policy's, by its own names.
        model: what is called, with the values that :meth:`merged_parameters` returns.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        layers: dict[str, Any] = {
            n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")
        }
        # a matrix that is tied to another (a head to the embedding) cannot be merged: the other would move too
        untied = all(f"{n}.base_layer.weight" in self.parameters for n in layers)
        self.layers = layers if untied and all(is_mergeable_lora(m) for m in layers.values()) else {}
        wrapped = bool(self.layers) and hasattr(model, "get_base_model")
        self.model: nn.Module = model.get_base_model() if wrapped else model  # type: ignore[operator]
        self.prefix = next((n for n, m in model.named_modules() if m is self.model), "") + "." if wrapped else ""

    def merged_parameters(self, parameters: Mapping[str, Tensor] | None = None) -> Tensors:
        """Return the parameters that ``self.model`` is called with, by its names, LoRA merged.

        Args:
            parameters: values in the place of the policy's own, by the policy's names.
        """
        given = dict(parameters or {})
        out: Tensors = {}
        for name, layer in self.layers.items():
            (adapter,) = layer.active_adapters
            ends = (f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight", "base_layer.weight")
            A, B, W = (given.pop(f"{name}.{end}", self.parameters[f"{name}.{end}"]) for end in ends)
            delta = float(layer.scaling[adapter]) * (B @ A)
            out[f"{name}.weight"] = W + (delta.T if layer.fan_in_fan_out else delta)
        rest = {n.replace(".base_layer.", "."): t for n, t in given.items()} if self.layers else given
        return {n.removeprefix(self.prefix): t for n, t in (out | rest).items()}


def is_mergeable_lora(layer: Any) -> bool:
    """Whether a layer's adapter is one LoRA pair of matrices beside an unquantised linear map, and nothing else."""
    active = list(layer.active_adapters)
    if len(active) != 1 or layer.merged or getattr(layer, "disable_adapters", False) or active[0] not in layer.lora_A:
        return False
    pair = (layer.lora_A[active[0]], layer.lora_B[active[0]])
    base = type(layer.base_layer).__name__
    variants = getattr(layer, "lora_variant", {})
    return (
        all(type(m) is nn.Linear and m.bias is None for m in pair)
        and base in ("Linear", "Conv1D")
        # in half precision a sum would round the adapter's small moves away
        and layer.base_layer.weight.dtype == pair[0].weight.dtype
        and layer.base_layer.weight.is_floating_point()
        and active[0] not in variants
        and not getattr(layer, "use_dora", {}).get(active[0], False)
    )


@contextmanager
def prepared_for_inference(model: nn.Module) -> Iterator[InferencePolicy]:
    """Prepare a policy for passes without derivatives, and put everything back afterwards."""
    policy = InferencePolicy(model)
    held: list[tuple[nn.Module, str, nn.Module]] = []
    with eval_mode(model), attention_implementation(model, "sdpa"):  # only derivatives need eager attention
        try:
            for name, layer in policy.layers.items():
                above, _, last = name.rpartition(".")
                parent = model.get_submodule(above)
                held.append((parent, last, layer))
                parent._modules[last] = layer.base_layer
            yield policy
        finally:
            for parent, last, layer in held:
                parent._modules[last] = layer


@torch.no_grad()
def evaluate(
    model: nn.Module | InferencePolicy,
    sequences: Sequences,
    temperature: float = 1.0,
    parameters: Mapping[str, Tensor] | None = None,
    chunk: int = 64,
    side: PaddingSide = "left",
) -> Scores:
    """Return a policy's scores (N, T) of sequences, in eval mode and without autocast.

    Args:
        model: the policy, or one that is :func:`prepared_for_inference`.
        sequences: N of them.
        temperature: of the distribution that tokens are sampled from.
        parameters: values in the place of the model's own, by name.
        chunk: sequences in one pass.
        side: see :func:`~lightning_toys.update_entropy.sequences.pad_batch`.
    """
    if not isinstance(model, InferencePolicy):
        with prepared_for_inference(model) as policy:
            return evaluate(policy, sequences, temperature, parameters, chunk, side)
    values = model.merged_parameters(parameters)
    parts: list[tuple[list[int], tuple[Tensor, ...]]] = []
    for rows in length_sorted_chunks(sequences, chunk):
        batch = pad_batch(sequences.take(rows), model.device, side)
        parts.append((rows, (*policy_scores(model.model, batch, temperature, values), batch.mask)))
    logp, h, mask = merge_chunks(parts, len(sequences), max(1, *sequences.lengths))
    require_numbers(model.model, logp[mask > 0], values.values())
    return Scores(logp, h, mask, torch.tensor(sequences.prompt_index, device=model.device))


@torch.no_grad()
def evaluate_many(
    policy: InferencePolicy,
    sequences: Sequences,
    temperature: float,
    parameters: Sequence[Mapping[str, Tensor]],
    chunk: int = 64,
) -> list[Scores]:
    """Return :func:`evaluate` of one policy at K sets of weights, all of them in one vectorised pass a chunk.

    What is given is held K times at once, and so are the activations.

    Args:
        policy: :func:`prepared_for_inference`.
        sequences: N of them.
        temperature: of the distribution that tokens are sampled from.
        parameters: K times values in the place of the model's own, by name, the same names each time.
        chunk: sequences in one pass.
    """
    if len(parameters) == 1:
        return [evaluate(policy, sequences, temperature, parameters[0], chunk)]
    merged = [policy.merged_parameters(p) for p in parameters]
    values = {name: torch.stack([m[name] for m in merged]) for name in merged[0]}
    del merged
    parts: list[tuple[list[int], list[Tensor]]] = []
    for rows in length_sorted_chunks(sequences, chunk):
        batch = pad_batch(sequences.take(rows), policy.device)

        def scores(one: Tensors) -> tuple[Tensor, Tensor]:
            return policy_scores(policy.model, batch, temperature, one)  # noqa: B023

        with attention_implementation(policy.model, "eager"):  # the fused kernels have no batching rule everywhere
            found = vmap(scores)(values)
        parts.append((rows, [*found, batch.mask.expand(len(parameters), *batch.mask.shape)]))
    out = []
    for k in range(len(parameters)):
        one = [(rows, tuple(x[k] for x in each)) for rows, each in parts]
        logp, h, mask = merge_chunks(one, len(sequences), max(1, *sequences.lengths))
        require_numbers(policy.model, logp[mask > 0], [v[k] for v in values.values()])
        out.append(Scores(logp, h, mask, torch.tensor(sequences.prompt_index, device=policy.device)))
    return out
