"""Settings before a run: plain, flat and side by side, and the classes that they name."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from lightning_toys.errors import ToyError
from lightning_toys.training.module import ToyModule


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration as {"model.lr": ...}, without the class_path/init_args levels."""
    if isinstance(tree, dict):
        out: dict[str, Any] = {}
        for key, value in tree.items():
            if key == "init_args":
                out.update(flatten(value, prefix))
            else:
                name = prefix if key == "class_path" else f"{prefix}.{key}" if prefix else key
                out.update(flatten(value, name))
        return out
    return {prefix: tree if isinstance(tree, int | float | bool | str) else str(tree)}


def reproducible_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the model and data sections without what is the machine's and changes no number: no run is told by it."""
    data = settings["data"]
    inner = {k: v for k, v in (data.get("init_args") or {}).items() if k != "num_workers"}
    return {"model": settings["model"], "data": {**data, "init_args": inner} if "init_args" in data else data}


def short_name(value: Any) -> Any:
    """Return a class of ours by its short name."""
    return value.split(".")[-1] if isinstance(value, str) and value.startswith("lightning_toys.") else value


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (flag, now, was) for each model and data setting that differs."""
    a = flatten({k: was[k] for k in ("model", "data")})
    b = flatten({k: now[k] for k in ("model", "data")})
    return [(f"--{k}", b[k], a.get(k)) for k in b if k in a and a[k] != b[k]]


def class_paths(tree: Any) -> set[str]:
    """Return every class that a configuration names."""
    if isinstance(tree, list | tuple):
        return {c for item in tree for c in class_paths(item)}
    if not isinstance(tree, dict):
        return set()
    own = {tree["class_path"]} if isinstance(tree.get("class_path"), str) else set()
    return own | {c for item in tree.values() for c in class_paths(item)}


def experiment_of(class_path: str) -> str:
    """Return the experiment's package, ``lightning_toys.EXPERIMENT``, or the top package of somebody else's class."""
    parts = class_path.split(".")
    return parts[1] if parts[0] == "lightning_toys" and len(parts) > 2 else parts[0]


def experiment_class(class_path: str) -> type[ToyModule]:
    """Return an experiment's class.

    Raises:
        ToyError: the class is none of ours.
    """
    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if not isinstance(kind, type) or not issubclass(kind, ToyModule) or kind.build is ToyModule.build:
        raise ToyError(f"--model: {class_path} is not an experiment of lightning_toys")
    return kind


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
