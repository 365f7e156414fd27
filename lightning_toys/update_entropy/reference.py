"""The reference policy of a KL penalty: a policy without its adapter, a second model, or the backbone with an adapter.

TRL's reference is the first where its trainer adds the adapter (``peft_config``); a copy of the model that the training
begins with where all parameters are trained; and where its trainer is handed a model with an adapter already, the model
with a frozen copy of that adapter as it was at the start, which is the third here, given by its folder. Without a
reference the policy's own adapter is switched off, whatever it was at the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_toys.errors import ToyError, require
from lightning_toys.update_entropy.checkpoints import (
    flag_error,
    load_adapter,
    load_backbone,
    resolve_backbone,
)
from lightning_toys.update_entropy.forward import evaluate
from lightning_toys.update_entropy.sequences import (
    PaddedBatch,
    Sequences,
    eval_mode,
    response_logits,
    token_logp,
)

REFERENCE = "--model.reference"


def is_adapter_folder(source: str) -> bool:
    """Whether a folder has an adapter as peft saves it, and no whole model."""
    folder = Path(source).expanduser()
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def load_reference(source: str, policy: nn.Module, backbone: str | None = None) -> nn.Module:
    """Return a model as the reference of a policy, frozen, in the policy's dtype.

    Args:
        source: as :func:`~lightning_toys.update_entropy.checkpoints.resolve_backbone` takes it, or an adapter's folder.
        policy: a causal language model, with or without an adapter.
        backbone: the model, read once more, that an adapter is put into.

    Raises:
        ToyError: there is no such model, its tokens are not the policy's, or there is no backbone for an adapter.
    """
    dtype, adapter = next(policy.parameters()).dtype, is_adapter_folder(source)
    if adapter and backbone is None:
        raise flag_error(REFERENCE, f"{source} is an adapter, not allowed without --model.backbone; give a whole model")
    try:
        found = load_backbone(resolve_backbone(*((backbone,) if adapter and backbone else (source, REFERENCE))), dtype)
        found = load_adapter(found, source) if adapter else found
    except ToyError as error:
        flag = "--model.adapter" if adapter else "--model.backbone"
        raise ToyError(str(error).replace(flag, REFERENCE, 1)) from error
    inner: Any = base_model(policy)
    theirs: Any = base_model(found)
    sizes = [m.config.get_text_config().vocab_size for m in (theirs, inner)]
    if sizes[0] != sizes[1]:
        raise flag_error(REFERENCE, f"{source} has {sizes[0]} tokens, the policy {sizes[1]}; give a model of its kind")
    return found.requires_grad_(False)


def base_model(model: nn.Module) -> nn.Module:
    """Return the model that an adapter is in; a model without one is its own."""
    found: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return found


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """Run a model without its adapter meanwhile; what requires a gradient is put back afterwards, peft would not.

    Args:
        model: a peft model.

    Raises:
        ToyError: it has no adapter.
    """
    require(
        hasattr(model, "disable_adapter"),
        f"{REFERENCE}: null is not allowed where all parameters are trained; give the model that the KL penalty keeps "
        "the policy near to",
    )
    anything: Any = model
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with anything.disable_adapter():
            yield model
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@torch.no_grad()
def reference_logp(
    model: nn.Module, reference: nn.Module | None, sequences: Sequences, temperature: float = 1.0, chunk: int = 64
) -> Tensor:
    """Return the reference's log-probability of each response token (N, T), in eval mode and without autocast.

    Args:
        model: the policy.
        reference: a model of the same tokens; None: the policy without its adapter.
        sequences: N of them.
        temperature: that they were generated at; the reference's logits are divided by it too, as TRL does.
        chunk: sequences in one pass.

    Raises:
        ToyError: there is no reference, and the policy has no adapter.
    """
    if reference is not None:
        return evaluate(reference, sequences, temperature, chunk=chunk).logp
    with adapter_off(model):
        return evaluate(model, sequences, temperature, chunk=chunk).logp


@torch.no_grad()
def batch_reference_logp(
    model: nn.Module, reference: nn.Module | None, batch: PaddedBatch, temperature: float = 1.0
) -> Tensor:
    """Return the reference's log-probability of each response token (N, T), in eval mode, in the ambient autocast.

    A policy that is trained under autocast is rounded, and a reference that is not would be away from it by as much:
    the penalty, which has its least value where the two are equal, would have a floor above 0.

    Args:
        model: the policy.
        reference: a model of the same tokens; None: the policy without its adapter.
        batch: a padded batch, the very one that the policy's pass is of.
        temperature: see :func:`reference_logp`.

    Raises:
        ToyError: there is no reference, and the policy has no adapter.
    """
    with nullcontext(reference) if reference is not None else adapter_off(model) as there, eval_mode(there):
        return token_logp(response_logits(there, batch), batch, temperature)
