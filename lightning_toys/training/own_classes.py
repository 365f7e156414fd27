"""Classes of somebody's own: whose they are, and what their calls give, before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_toys.errors import ToyError, one_line, require


@contextmanager
def trial() -> Iterator[None]:
    """Try classes on the CPU and in single precision, whatever device and precision a Trainer builds networks in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def attempt(where: str, call: Callable[[], Any]) -> Any:
    """Return what a call of somebody's code gives.

    Raises:
        ToyError: it fails; says where and with what, in one line.
    """
    try:
        return call()
    except ToyError:
        raise
    except Exception as error:
        raise ToyError(f"{where} fails: {type(error).__name__}: {one_line(error)[:200]}") from None


def is_own(thing: object) -> bool:
    """Whether an object's class is somebody's own, and not one of this package's."""
    return not type(thing).__module__.startswith("lightning_toys.")


def trial_pair(seeds: Sequence[int]) -> list[int]:
    """Return two seeds to try a class with, whatever the number of a run's.

    >>> trial_pair([7, 8, 9]), trial_pair([7])
    ([7, 8], [7, 6])
    """
    return list(seeds[:2]) if len(seeds) > 1 else [seeds[0], seeds[0] ^ 1]


def shape_of(found: Any) -> Any:
    """Return a tensor's shape, or what it is in place of one."""
    return tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__


def require_methods(flag: str, thing: object, base: type, *names: str) -> None:
    """Refuse an object that lacks a method of its base, which only raises there.

    Raises:
        ToyError: names it.
    """
    for name in names:
        missing = getattr(type(thing), name) is getattr(base, name)
        require(not missing, f"{flag}: {type(thing).__name__} has no {name}; give it (see {base.__name__}.{name})")
