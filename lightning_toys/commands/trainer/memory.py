"""Sizes beyond what 64 bits, single precision or memory hold, and the setting that asked for them."""

from __future__ import annotations

from typing import Any

import torch

from lightning_toys.commands.settings import flatten
from lightning_toys.errors import WHOLE, ToyError

SINGLE = 3e38  # the largest number of single precision is 3.4e38


def beyond_memory(error: Exception) -> str:
    """Return what an error says of memory that is not there, empty if it is another error."""
    text = " ".join(str(error).split())
    words = (
        *("out of memory", "t allocate memory", "not enough memory", "nable to allocate"),
        *("array is too big", "calculation overflowed", "maximum allowed dimension"),
    )
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return text[:200] or "out of memory" if known or any(w in text for w in words) else ""


def largest(settings: dict[str, Any]) -> str:
    """Return the greatest size among flat settings: what memory most likely ran out for."""
    sizes = {k: v for k, v in settings.items() if isinstance(v, int) and k.startswith(("model.", "data."))}
    name = max(sizes, key=lambda k: sizes[k])
    return f"--{name}: {sizes[name]} is more than memory holds"


def check_numbers(settings: dict[str, Any]) -> None:
    """Refuse numbers that no tensor and no loop takes: the last net, below the bounds of the constructors.

    Args:
        settings: a verb's, nested.

    Raises:
        ToyError: names the flag.
    """
    for name, value in flatten(settings).items():
        if isinstance(value, int) and not -WHOLE <= value <= WHOLE:
            raise ToyError(f"--{name}: {str(value)[:40]} is not allowed; give an integer that 64 bits hold")
        finite = isinstance(value, float) and abs(value) < float("inf")
        if finite and abs(value) > SINGLE and name.startswith(("model.", "data.")):
            raise ToyError(f"--{name}: {value:g} is not allowed; give a number up to {SINGLE:g} in size")
