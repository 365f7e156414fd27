"""Forms that an optimiser's state comes in, as torch's own ``state_dict()``: parameters by number, in groups.

FSDP2 and ``torch.distributed.checkpoint`` key parameters by their names; torchtitan flattens that, one key a value.
Trainers leave the step of a checkpoint beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OPTIMIZER = "--model.optimizer_state"
LARGEST_JSON = 1 << 28  # bytes of a trainer_state.json, which holds the log of a whole training


def recorded_step(path: str | Path | None) -> int | None:
    """Return the step that transformers' Trainer has noted beside a file or in a folder, None if there is none.

    Args:
        path: folder of a checkpoint, or a file in it.
    """
    if path is None:
        return None
    here = Path(path).expanduser()
    file = (here if here.is_dir() else here.parent) / "trainer_state.json"
    try:
        if not file.is_file() or file.stat().st_size > LARGEST_JSON:
            return None
        step = json.loads(file.read_text())["global_step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # somebody else's file of that name
        return None
    return step if type(step) is int else None


def by_number(optimizer: Any) -> tuple[Any, list[str] | None]:
    """Return an optimiser's state keyed by numbers, and the names of its parameters in order if it was keyed by names.

    Args:
        optimizer: what may be a state; anything that is none is returned as it is.
    """
    if not isinstance(optimizer, Mapping):
        return optimizer, None
    whole = unflatten(optimizer) if "state" not in optimizer else optimizer
    groups, states = whole.get("param_groups"), whole.get("state")
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        return optimizer, None
    names = [n for g in groups for n in g["params"]]
    if not names or not isinstance(states, Mapping) or not all(isinstance(n, str) for n in names):
        return optimizer, None
    numbers = {n: i for i, n in enumerate(dict.fromkeys(names))}
    numbered = [{**g, "params": [numbers[n] for n in g["params"]]} for g in groups]
    # a state that is in no group keeps its name, and is then refused by it
    return {"param_groups": numbered, "state": {numbers.get(n, n): s for n, s in states.items()}}, list(numbers)


def unflatten(flat: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a state whose keys are ``state.NAME.KEY`` and ``param_groups.NAME.KEY`` in torch's form, by names.

    Args:
        flat: of torchtitan; other keys are left out.
    """
    states: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, _, rest = str(key).partition(".")
        name, _, field = rest.rpartition(".")
        if name and kind in ("state", "param_groups"):
            (states if kind == "state" else settings).setdefault(name, {})[field] = value
    groups = [{**values, "params": [name]} for name, values in settings.items()]
    return {"state": states, "param_groups": groups} if groups else {}
