"""Forward passes without derivatives, as a probe makes them by the hundred: the same weights, moved a little each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_toys.update_entropy.adamw import Tensors
from lightning_toys.update_entropy.estimators import Scores
from lightning_toys.update_entropy.sequences import (
    Sequences,
    Side,
    attention,
    chunks,
    gathered,
    in_eval,
    pack,
    policy_scores,
)


class Passes:
    """A policy made ready for many passes: in eval mode, LoRA folded into the matrices beside it, fused attention.

    W + scale B A once, in place of two more products a matrix and pass and of peft's own Python, is a fifth of a small
    model's pass. Only for passes without derivatives, and only while :func:`ready` lasts; a policy whose adapter is of
    another kind is passed through as it is.

    Args:
        model: the policy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.own = dict(model.named_parameters())
        self.device = next(iter(self.own.values())).device
        layers: dict[str, Any] = {
            n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")
        }
        # a matrix that is tied to another (a head to the embedding) cannot be folded: the other would move too
        untied = all(f"{n}.base_layer.weight" in self.own for n in layers)
        self.layers = layers if untied and all(plain_lora(m) for m in layers.values()) else {}
        wrapped = bool(self.layers) and hasattr(model, "get_base_model")
        self.model: nn.Module = model.get_base_model() if wrapped else model  # type: ignore[operator]
        self.prefix = next((n for n, m in model.named_modules() if m is self.model), "") + "." if wrapped else ""

    def values(self, parameters: Mapping[str, Tensor] | None = None) -> Tensors:
        """Return what the passes' model takes, by its own names.

        Args:
            parameters: values in the place of the policy's own, by the policy's names.
        """
        given = dict(parameters or {})
        out: Tensors = {}
        for name, layer in self.layers.items():
            (adapter,) = layer.active_adapters
            ends = (f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight", "base_layer.weight")
            A, B, W = (given.pop(f"{name}.{end}", self.own[f"{name}.{end}"]) for end in ends)
            delta = float(layer.scaling[adapter]) * (B @ A)
            out[f"{name}.weight"] = W + (delta.T if layer.fan_in_fan_out else delta)
        rest = {n.replace(".base_layer.", "."): t for n, t in given.items()} if self.layers else given
        return {n.removeprefix(self.prefix): t for n, t in (out | rest).items()}


def plain_lora(layer: Any) -> bool:
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
def ready(model: nn.Module) -> Iterator[Passes]:
    """Make a policy ready for passes, and put everything back afterwards."""
    passes = Passes(model)
    held: list[tuple[nn.Module, str, nn.Module]] = []
    with in_eval(model), attention(model, "sdpa"):  # derivatives need attention written out; these passes have none
        try:
            for name, layer in passes.layers.items():
                above, _, last = name.rpartition(".")
                parent = model.get_submodule(above)
                held.append((parent, last, layer))
                parent._modules[last] = layer.base_layer
            yield passes
        finally:
            for parent, last, layer in held:
                parent._modules[last] = layer


@torch.no_grad()
def evaluate(
    model: nn.Module | Passes,
    sequences: Sequences,
    temperature: float = 1.0,
    parameters: Mapping[str, Tensor] | None = None,
    chunk: int = 64,
    side: Side = "left",
) -> Scores:
    """Return what a policy says of sequences, in eval mode and single precision or better.

    Args:
        model: the policy, or one that is :func:`ready`.
        sequences: N of them.
        temperature: of the law the tokens are drawn from.
        parameters: values in the place of the model's own, by name.
        chunk: sequences in one pass.
        side: see :func:`~lightning_toys.update_entropy.sequences.pack`.
    """
    if not isinstance(model, Passes):
        with ready(model) as passes:
            return evaluate(passes, sequences, temperature, parameters, chunk, side)
    values = model.values(parameters)
    parts: list[tuple[list[int], tuple[Tensor, ...]]] = []
    for rows in chunks(sequences, chunk):
        packed = pack(sequences.take(rows), model.device, side)
        parts.append((rows, (*policy_scores(model.model, packed, temperature, values), packed.mask)))
    logp, h, mask = gathered(parts, len(sequences), max(1, *sequences.lengths))
    return Scores(logp, h, mask, torch.tensor(sequences.prompt, device=model.device))
