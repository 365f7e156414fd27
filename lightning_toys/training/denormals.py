"""Zeros in place of denormal numbers, which many processors compute with ten to a hundred times more slowly.

Below 1.2e-38 (single precision) a number has fewer digits than others. Adam's moments of weights whose gradient has
become zero, those of a unit that no point activates any more, pass through that range on their way to zero, and a long
training may spend most of its time there. XLA flushes them as well. Neither a moment nor a gradient of that size moves
a weight: AdamW adds eps = 1e-8 to the second moment's root.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def flushes_denormals() -> bool:
    """Whether this thread takes denormal numbers for zero."""
    return not bool(torch.full((), 1e-40, dtype=torch.float32).mul_(1.0))


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Take denormal numbers for zero within a block or, as a decorator, a function; afterwards it is as before.

    A setting of the processor, for this thread. Where it has none, nothing changes but the time that is needed.
    """
    before = flushes_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
