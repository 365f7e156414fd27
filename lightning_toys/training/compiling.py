"""Compiled code, by ``torch.compile``: kernels fused on any device, and on a GPU replayed as CUDA graphs.

The numbers differ from the uncompiled ones by roundings.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

from lightning_toys.errors import note, require

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
kept: dict[Any, Any] = {}


def compile_function(f: Callable[Arguments, Result], graphs: bool = False) -> Callable[Arguments, Result]:
    """Return ``f`` compiled for tensors of fixed shapes, which torch does at the first call and keeps on disk.

    Its tensors are laid out afresh at every call: a view's strides tell of what it was cut from, such as a block of
    steps, and other strides are compiled for once more, until torch gives up after eight times.

    Args:
        f: a function of tensors, or a module's method; the tensors are positional.
        graphs: replay it on a GPU as CUDA graphs. What it returned before is then overwritten by the next call.
    """
    if not graphs and has_own_steps(getattr(f, "__self__", None)):
        note_loss()
    compiled: Any = torch.compile(f, dynamic=False, mode="reduce-overhead" if graphs else None)

    def call(*args: Any) -> Any:
        laid_out = (a.clone(memory_format=torch.contiguous_format) if isinstance(a, torch.Tensor) else a for a in args)
        return compiled(*laid_out)

    return cast("Callable[Arguments, Result]", call)


def has_own_steps(module: object) -> bool:
    """Whether a module's class takes steps by ``take_steps``, which compiled code keeps it from."""
    return sum("take_steps" in vars(kind) for kind in type(module).__mro__) > 1


@functools.cache
def note_loss() -> None:
    """Say, once, that compiled steps lose on a CPU to those with the backward pass written out.

    Measured on flow_vs_regression's flow, one thread, CPU time of a step after the compilation: one replica of width 64
    takes 1.36 ms compiled and .35 ms without, eight of width 256 take 7.1 and 4.8 ms.
    """
    note(
        "--model.compile: on a CPU this is slower than without it, whose steps have their backward pass written out; "
        "it is meant for GPUs"
    )


def kept_compiled(f: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return a function of a module's top level compiled, the same one at every call."""
    if f not in kept:
        kept[f] = torch.compile(f, dynamic=False)
    out: Callable[Arguments, Result] = kept[f]
    return out


def has_compiler() -> bool:
    """Whether there is a C++ compiler to compile with on a CPU."""
    return any(c and shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++"))


def check_compiler(flag: str) -> None:
    """Refuse to compile where there is nothing to compile with.

    Raises:
        ToyError: names the flag that asked for it.
    """
    require(has_compiler(), f"{flag}: true is not allowed; there is no C++ compiler (g++ or clang++) here")
