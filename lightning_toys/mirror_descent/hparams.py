"""Rewards and schedules as plain values, so that a checkpoint's hyper-parameters can rebuild them."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, TypeVar

import numpy as np

from lightning_toys.errors import require

PACKAGE = "lightning_toys.mirror_descent"
Base = TypeVar("Base")


def to_hparam(value: Any) -> dict[str, Any]:
    """Return an object's class_path, and its init_args if its class is one of this package's."""
    kind = type(value)
    if not kind.__module__.startswith(f"{PACKAGE}."):
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
    given = {name: getattr(value, name) for name in inspect.signature(kind).parameters}  # each is kept by its name
    return {"class_path": f"{PACKAGE}.{kind.__name__}", "init_args": {k: to_json(v) for k, v in given.items()}}


def to_json(value: Any) -> Any:
    """Return a number, or a sequence or an array of them, as Python's own numbers and lists."""
    if isinstance(value, np.ndarray | list | tuple):
        return [to_json(v) for v in value]
    return value if isinstance(value, int) else float(value)


def from_hparam(base: type[Base], value: Base | dict[str, Any] | None, name: str, default: Base) -> Base:
    """Return an object as it was given, from a checkpoint's plain values, or its default.

    Args:
        base: of its class.
        value: the object, the result of :func:`to_hparam`, or None.
        name: of the constructor's argument.
        default: for None.

    Raises:
        ToyError: a checkpoint names a class that is not this package's, which is not imported for it.
    """
    if not isinstance(value, dict):
        return default if value is None else value
    path = value["class_path"]
    experiment = importlib.import_module(PACKAGE)
    exported = path.removeprefix(f"{PACKAGE}.") in experiment.PLACES and path.startswith(f"{PACKAGE}.")
    kind = getattr(experiment, path.removeprefix(f"{PACKAGE}.")) if exported else None
    require(
        isinstance(kind, type) and issubclass(kind, base),
        f"{name}: the checkpoint was made with {path}; give it: load_from_checkpoint(..., {name}=...)",
    )
    assert kind is not None
    made: Base = kind(**value["init_args"])
    return made
