"""Classes of somebody's own: whose they are, and what their calls give, before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_toys.errors import ToyError, one_line


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
