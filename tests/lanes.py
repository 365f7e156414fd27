"""A stand-in for triton in numpy, enough for our kernel to run as it stands where there is no triton."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

PROBLEM = [0]  # the running program's index


class Lanes(np.ndarray):
    """An array with Triton's cast."""

    def to(self, kind: Any) -> Lanes:
        return self.astype(kind)


class Pointer(NamedTuple):
    """An address in a tensor's memory, or one for each lane."""

    memory: np.ndarray
    at: Any = 0

    def __add__(self, steps: Any) -> Pointer:  # type: ignore[override]
        return Pointer(self.memory, self.at + np.asarray(steps, np.int64))


def lanes(x: Any) -> Lanes:
    return np.asarray(x).view(Lanes)


def load(p: Pointer, mask: Any = True, other: float = 0.0) -> Lanes:
    inside = np.broadcast_to(mask, np.shape(p.at))
    return lanes(np.where(inside, p.memory[np.where(inside, p.at, 0)], other).astype(p.memory.dtype))


def store(p: Pointer, values: Any, mask: Any) -> None:
    p.memory[np.asarray(p.at)[mask]] = np.asarray(values)[mask]


class Kernel:
    """What the decorator makes: ``kernel[grid](...)`` runs the programs one after the other."""

    def __init__(self, f: Callable[..., None]) -> None:
        self.f = f

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **more: Any) -> None:
            assert 1 <= num_warps <= 32
            given = [Pointer(a.view(-1).numpy()) if isinstance(a, torch.Tensor) else a for a in args]
            for PROBLEM[0] in range(*grid):
                self.f(*given, **more)

        return launch


language = types.SimpleNamespace(
    constexpr=int, int32=np.int32, int64=np.int64, float64=np.float64, load=load, store=store,
    program_id=lambda axis: lanes(PROBLEM[0]),
    arange=lambda a, b: lanes(np.arange(a, b, dtype=np.int32)),
    full=lambda shape, x, kind: lanes(np.full(shape, x, kind)),
    zeros=lambda shape, kind: lanes(np.zeros(shape, kind)),
    where=lambda c, a, b: lanes(np.where(c, a, b)),
    sum=lambda x, axis: lanes(np.asarray(x).sum(axis)),
    min=lambda x, axis: lanes(np.asarray(x).min(axis)),
)  # fmt: skip
triton = types.SimpleNamespace(jit=Kernel, language=language, next_power_of_2=lambda n: 1 << (n - 1).bit_length())
