"""Settings before a run: plain, flat and side by side, and the classes that they name. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import Any

CLASS = re.compile(r"([A-Za-z_]\w*\.)+[A-Z]\w*")  # module.Class


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
    """Return a class's path by its last name; anything else as it is."""
    return value.rpartition(".")[2] if isinstance(value, str) and CLASS.fullmatch(value) else value


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
