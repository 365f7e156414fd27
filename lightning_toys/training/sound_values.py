"""Trees of tensors and plain values as files hold them: whether each value is what it claims to be, and of a sane size.

A file that is read with ``weights_only`` runs nothing, and can still hold a tensor without data, one that claims more
numbers than are there, a list that contains itself, or an integer that no tensor takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MAX_DEPTH = 64
MAX_VALUES = 5_000_000
DTYPES = {
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


def unsound_tensor(x: Tensor) -> str:
    """Return why a tensor cannot be used as it is, empty if it can.

    Example:
        >>> unsound_tensor(torch.zeros(2, device="meta"))
        'is a tensor without data (device meta)'
        >>> unsound_tensor(torch.zeros(1).expand(10**9))
        'claims 4000000000 bytes, and holds 4'
    """
    if type(x) not in (Tensor, nn.Parameter):
        return f"is a {type(x).__name__}, no plain tensor"
    if x.is_nested or x.layout != torch.strided:
        return f"is a {'nested' if x.is_nested else str(x.layout).removeprefix('torch.')} tensor, no dense one"
    if x.is_meta:
        return "is a tensor without data (device meta)"
    if x.dtype not in DTYPES:
        return f"is a tensor of {x.dtype}"
    claimed, held = x.numel() * x.element_size(), x.untyped_storage().nbytes()
    return f"claims {claimed} bytes, and holds {held}" if claimed > held else ""


def key_name(key: Any) -> str:
    """Return a mapping's key in few words."""
    if isinstance(key, int):
        return str(key) if key.bit_length() <= 64 else f"an integer of {key.bit_length()} bits"
    return str(key)[:80]


def unsound(value: Any) -> str:
    """Return which part of a tree cannot be used as it is, and why; empty if all can.

    Args:
        value: mappings, lists, tuples, tensors and plain values, as ``torch.load(weights_only=True)`` returns them.
    """
    todo: list[tuple[str, Any, int]] = [("", value, 0)]
    count = 0
    while todo:
        where, item, depth = todo.pop()
        count += 1
        if depth > MAX_DEPTH:
            return f"{where[:80]}... is nested deeper than {MAX_DEPTH} levels"
        if count > MAX_VALUES:
            return f"it holds more than {MAX_VALUES} values"
        why = ""
        if isinstance(item, Tensor):
            why = unsound_tensor(item)
        elif isinstance(item, int) and not -(2**63) <= item < 2**63:
            why = f"is an integer of {item.bit_length()} bits"
        elif isinstance(item, Mapping):
            prefix = f"{where}." if where else ""
            todo += [(f"{prefix}{key_name(k)}", v, depth + 1) for k, v in item.items()]
        elif isinstance(item, Sequence) and not isinstance(item, str | bytes):
            todo += [(f"{where}[{i}]", v, depth + 1) for i, v in enumerate(item)]
        if why:
            return f"{where or 'it'} {why}"
    return ""
