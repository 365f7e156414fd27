"""Classes of somebody's own: whose they are, and what their calls give, before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_toys.errors import ToyError, one_line


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
