"""Errors that mean too little memory, and the setting that most likely asked for too much."""

from __future__ import annotations

from typing import Any

import torch


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
