"""Rewards and schedules as plain values, so that a checkpoint's hyper-parameters can rebuild them."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning_toys.errors import require

PACKAGE = "lightning_toys.mirror_descent"
Base = TypeVar("Base")


def to_hparam(value: Any) -> dict[str, Any]:
    """Return an object's class_path, and its init_args if its class is one of this package's."""
    kind = type(value)
    if not kind.__module__.startswith(f"{PACKAGE}."):
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}"}
    arguments = {k: v if isinstance(v, int) else float(v) for k, v in vars(value).items()}
    return {"class_path": f"{PACKAGE}.{kind.__name__}", "init_args": arguments}


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
    kinds = {f"{PACKAGE}.{k.__name__}": k for k in base.__subclasses__() if k.__module__.startswith(f"{PACKAGE}.")}
    path = value["class_path"]
    require(
        path in kinds, f"{name}: the checkpoint was made with {path}; give it: load_from_checkpoint(..., {name}=...)"
    )
    return kinds[path](**value["init_args"])
